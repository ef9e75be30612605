"""Small models, data and arguments for the Hugging Face Trainer."""

from __future__ import annotations

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainingArguments

__all__ = ["PAD", "Sequences", "arguments", "gpt", "pad", "tiny"]

PAD = 0


class Sequences(torch.utils.data.Dataset):
    """Sequences of different lengths, whose label is whether a 7 occurs; with columns the model does not know."""

    def __init__(self, n=13):
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for i in range(n):
            tokens = torch.randint(1, 20, (3 + i % 4,), generator=generator).tolist()
            self.rows.append({"input_ids": tokens, "labels": int(7 in tokens or i % 3 == 0), "note": f"row {i}"})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(self.rows[i])


def pad(rows):
    """A collator that pads, as those of tokenizers do."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [PAD] * (length - len(row["input_ids"])) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def tiny(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=12, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config).to(dtype)


def arguments(tmp_path, **options):
    settings = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 5e-3, "weight_decay": 0.1,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "seed": 1,
    }  # fmt: skip
    return TrainingArguments(str(tmp_path / "out"), **{**settings, **options})


def gpt(rate=0.1):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=12, n_embd=8, n_layer=2, n_head=2, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate
    )
    return GPT2LMHeadModel(config)  # of float32, which its loss computes in
