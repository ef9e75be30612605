"""Table 1, very small."""

from __future__ import annotations

from explaind_studies.table1_models import Setting

TINY = Setting(
    seed=0, nodes=("midpoint:10", "midpoint:100", 1), explained=5, p=5, train=10, test=5, most_steps=2, cnn_width=1,
    cnn_epochs=1, cnn_batch=720, resnet_width=1, resnet_images=9, resnet_batch=4, resnet_explained=3,
    resnet_nodes=("midpoint:10",),
)  # fmt: skip
