"""How the conformance kit draws trainings for optimizers of other packages, which are imported when they are used."""

from __future__ import annotations

from hypothesis import strategies as st

from explaind_core import UpdateRule
from explaind_core.rules import Trials
from explaind_optimizers.ademamix import AdEMAMixRule, SimplifiedAdEMAMixRule
from explaind_optimizers.lamb import LambRule
from explaind_optimizers.lars import LARSRule, SGDWRule
from explaind_optimizers.lion import LionRule, SignSGDRule, TigerRule
from explaind_optimizers.prodigy import ProdigyRule, PytorchOptimizerProdigyRule
from explaind_optimizers.relatives import AdaBeliefRule, AggMoRule, LaPropRule, QHAdamRule, QHMRule
from explaind_optimizers.schedule_free import (
    AdamWScheduleFreePaperRule,
    AdamWScheduleFreeRule,
    RAdamScheduleFreeRule,
    SGDScheduleFreeRule,
)
from explaind_optimizers.shampoo import ShampooRule
from explaind_optimizers.soap import SOAPRule
from explaind_optimizers.sophia import SophiaHRule
from explaind_optimizers.trials_entry import (
    ADANORM,
    ADAPTIVE,
    BETA,
    BETAS,
    COMMON,
    DECAY,
    EPS,
    MOMENTUM,
    PLAIN,
    POSITIVE,
    RECTIFY,
    SOME,
    SWITCH,
    Entry,
    Strategies,
    among,
    draws,
    given_hessians,
)  # fmt: skip

__all__ = ["TABLE", "trials_elsewhere"]

PO, SF = "pytorch_optimizer:", "schedulefree:"

HEAVY = draws(dampening=among(0.0, 0.3), nesterov=SWITCH, momentum=MOMENTUM)
ESTIMATES = draws(
    lr=POSITIVE, betas=BETAS, beta3=among(None, 0.5), safeguard_warmup=SWITCH, d0=among(1e-6, 1e-1),
    d_coef=among(1.0, 2.0), growth_rate=among(float("inf"), 1.02),
)  # fmt: skip
SOAP = draws(
    SOME, betas=BETAS, shampoo_beta=among(None, 0.5), precondition_frequency=among(1, 2, 10), correct_bias=SWITCH,
    normalize_gradient=SWITCH, maximize=SWITCH, eps=among(1e-2, 1e-1),
)  # fmt: skip
WHOLE = draws(SOAP, precondition_1d=SWITCH, max_precondition_dim=among(3, 4, 10000))
SHAMPOO = draws(
    SOME, weight_decouple=SWITCH, fixed_decay=SWITCH, preconditioning_compute_steps=among(1, 2),
    matrix_eps=among(1e-2, 1.0), maximize=SWITCH,
)  # fmt: skip
# An interpolation that changes has no one evaluated point: eval() and train() then do not invert each other.
MIXED = draws(SOME, r=among(0.0, 0.5), weight_lr_power=among(0.0, 2.0), momentum=among(0.5, 0.9))
BOTH = draws(
    {n: s for n, s in MIXED.items() if n != "momentum"}, betas=st.tuples(among(0.5, 0.9), among(0.9, 0.999)), eps=EPS
)
WARM = draws(warmup_steps=among(0, 3))
LOOP = draws(foreach=SWITCH)


def free(rule: type[UpdateRule], path: str, *parts: Strategies, **more: st.SearchStrategy[object]) -> Entry:
    """A Schedule-Free optimizer."""
    return Entry(rule, path, draws(*parts, **more), SOME, elsewhere=True)


TABLE: dict[str, Entry] = {
    "Lion": Entry(
        LionRule, PO + "Lion", draws(COMMON, ADANORM, betas=BETAS, use_gc=SWITCH, cautious=SWITCH),
        draws(SOME, betas=BETAS),
    ),
    "Lion of lion_pytorch": Entry(
        LionRule, "lion_pytorch:Lion",
        draws(lr=POSITIVE, weight_decay=DECAY, betas=BETAS, decoupled_weight_decay=SWITCH),
        draws(SOME, betas=BETAS),
    ),
    "Tiger": Entry(TigerRule, PO + "Tiger", draws(COMMON, beta=BETA), draws(SOME, beta=BETA)),
    "SignSGD": Entry(
        SignSGDRule, PO + "SignSGD", draws(PLAIN, weight_decouple=SWITCH, momentum=MOMENTUM),
        draws(SOME, momentum=MOMENTUM),
    ),
    "Lamb": Entry(
        LambRule, PO + "Lamb",
        draws(
            COMMON, ADANORM, RECTIFY, betas=BETAS, eps=EPS, grad_averaging=SWITCH, max_grad_norm=among(0.0, 0.5, 1.0),
            adam=SWITCH, pre_norm=SWITCH,
        ),
        ADAPTIVE,
    ),
    "LARS": Entry(
        LARSRule, PO + "LARS", draws(PLAIN, HEAVY, trust_coefficient=among(1e-3, 0.5)),
        draws(SOME, momentum=MOMENTUM, trust_coefficient=among(1e-3, 1.0)),
    ),
    "SGDW": Entry(SGDWRule, PO + "SGDW", draws(PLAIN, HEAVY, weight_decouple=SWITCH), draws(SOME, momentum=MOMENTUM)),
    "AdEMAMix": Entry(
        AdEMAMixRule, PO + "AdEMAMix",
        draws(
            COMMON, betas=st.tuples(BETA, among(0.5, 0.999), among(0.9, 0.9999)), eps=EPS, alpha=among(0.0, 5.0),
            t_alpha_beta3=among(None, 4, 100.0), cautious=SWITCH, stable_adamw=SWITCH,
        ),
        draws(SOME, alpha=among(0.0, 0.5, 5.0)),
    ),
    "SimplifiedAdEMAMix": Entry(
        SimplifiedAdEMAMixRule, PO + "SimplifiedAdEMAMix",
        draws(
            COMMON, betas=st.tuples(among(0.9, 0.99), among(0.5, 0.95)), eps=EPS, alpha=among(0.0, 2.0),
            beta1_warmup=among(None, 3), min_beta1=among(0.5, 0.9),
        ),
        draws(SOME, alpha=among(0.0, 0.5, 5.0)),
    ),
    "AdamWScheduleFree": free(AdamWScheduleFreeRule, SF + "AdamWScheduleFree", BOTH, WARM, LOOP),
    "AdamWScheduleFreeReference": free(
        AdamWScheduleFreeRule, SF + "AdamWScheduleFreeReference", BOTH, WARM, decay_at_z=SWITCH
    ),
    "AdamWScheduleFreePaper": free(AdamWScheduleFreePaperRule, SF + "AdamWScheduleFreePaper", BOTH, WARM, LOOP),
    "SGDScheduleFree": free(SGDScheduleFreeRule, SF + "SGDScheduleFree", MIXED, WARM, LOOP),
    "SGDScheduleFreeReference": free(SGDScheduleFreeRule, SF + "SGDScheduleFreeReference", MIXED, WARM),
    "RAdamScheduleFree": free(RAdamScheduleFreeRule, SF + "RAdamScheduleFree", BOTH, LOOP, silent_sgd_phase=SWITCH),
    "ScheduleFreeAdamW": free(
        AdamWScheduleFreeRule, PO + "ScheduleFreeAdamW", PLAIN, BOTH, WARM, ams_bound=SWITCH,
        decoupling_c=among(0, 2, 50),
    ),
    "ScheduleFreeSGD": free(SGDScheduleFreeRule, PO + "ScheduleFreeSGD", PLAIN, MIXED, WARM, eps=EPS),
    "ScheduleFreeRAdam": free(RAdamScheduleFreeRule, PO + "ScheduleFreeRAdam", PLAIN, BOTH, silent_sgd_phase=SWITCH),
    # Both take what is not scheduled here from the first group, for all groups: the rate, betas, ...
    "Prodigy": Entry(
        ProdigyRule, "prodigyopt:Prodigy",
        draws(ESTIMATES, eps=EPS, weight_decay=DECAY, decouple=SWITCH, use_bias_correction=SWITCH, slice_p=among(1, 3)),
        draws(weight_decay=DECAY, eps=EPS),
    ),
    "Prodigy of pytorch_optimizer": Entry(
        PytorchOptimizerProdigyRule, PO + "Prodigy",
        draws(COMMON, ESTIMATES, bias_correction=SWITCH, eps=among(1e-8, 1e-3, None)), draws(weight_decay=DECAY),
    ),
    "Prodigy, one group": Entry(
        ProdigyRule, "prodigyopt:Prodigy", draws(ESTIMATES, betas=st.just((0.9, 0.999)), eps=EPS, decouple=SWITCH),
        draws(SOME, betas=st.tuples(BETA, among(0.5, 0.999))), groups=1,  # 0 has no averages to go on with
    ),
    "Prodigy of pytorch_optimizer, one group": Entry(
        PytorchOptimizerProdigyRule, PO + "Prodigy", draws(COMMON, ESTIMATES), draws(SOME, betas=BETAS), groups=1
    ),
    "SOAP": Entry(SOAPRule, PO + "SOAP", WHOLE, draws(SOME, betas=BETAS)),
    # A first gradient has fewer directions than Q. Along the others everything is rounding, and divided by eps.
    "SOAP, small eps": Entry(SOAPRule, PO + "SOAP", draws(WHOLE, eps=st.just(1e-8)), SOME, tolerance=1e-7),
    "SOAP, merged axes": Entry(
        SOAPRule, PO + "SOAP",
        draws(
            SOAP, merge_dims=st.just(True), max_precondition_dim=among(2, 6),
            data_format=among("channels_first", "channels_last"),
        ),
        SOME,
        # With one axis left, pytorch_optimizer 4.1 reshapes it to a single element, and fails.
        shapes=((4, 5), (2, 3, 2), (2, 3, 2, 4)),
    ),
    "Shampoo": Entry(ShampooRule, PO + "Shampoo", SHAMPOO, SOME),
    # K has the norm matrix_eps^(-1/2n) across what gradients there were so far, and rounding is multiplied by it.
    "Shampoo, small eps": Entry(
        ShampooRule, PO + "Shampoo", draws(SHAMPOO, matrix_eps=st.just(1e-6)), SOME, tolerance=1e-12
    ),
    # With momentum it is multiplied again in every step.
    "Shampoo with momentum": Entry(
        ShampooRule, PO + "Shampoo", draws(SHAMPOO, momentum=among(0.5, 0.9), matrix_eps=among(1e-6, 1e-2)),
        draws(SOME, momentum=MOMENTUM), tolerance=1e-11,
    ),
    "SophiaH": Entry(
        SophiaHRule, PO + "SophiaH",
        draws(COMMON, betas=BETAS, p=among(1e-2, 1.0), eps=among(1e-12, 1e-2), update_period=st.just(10**6)),
        draws(SOME, betas=BETAS), adapted=given_hessians,
    ),
    "AdaBelief": Entry(
        AdaBeliefRule, PO + "AdaBelief",
        draws(COMMON, ADANORM, RECTIFY, betas=BETAS, eps=among(1e-16, 1e-3), ams_bound=SWITCH), ADAPTIVE,
    ),
    "LaProp": Entry(
        LaPropRule, PO + "LaProp",
        draws(
            COMMON, betas=BETAS, eps=among(1e-15, 1e-3), centered=SWITCH, steps_before_using_centered=among(1, 10),
            ams_bound=SWITCH, cautious=SWITCH,
        ),
        SOME,
    ),
    "QHAdam": Entry(
        QHAdamRule, PO + "QHAdam",
        draws(COMMON, betas=BETAS, eps=EPS, nus=among((1.0, 1.0), (0.7, 0.5), (0.0, 0.0))), ADAPTIVE,
    ),
    "QHM": Entry(
        QHMRule, PO + "QHM", draws(COMMON, momentum=MOMENTUM, nu=among(0.0, 0.7, 1.0)),
        draws(SOME, momentum=MOMENTUM, nu=among(0.0, 0.7, 1.0)),
    ),
    "AggMo": Entry(AggMoRule, PO + "AggMo", draws(COMMON, betas=among((0.0, 0.9, 0.99), (0.5, 0.9))), SOME),
}  # fmt: skip


def trials_elsewhere(rule: UpdateRule) -> tuple[Trials, ...]:
    """The families of trainings for ``rule``, of those packages that are installed here."""
    found: list[Trials] = []
    for name, entry in TABLE.items():
        if entry.rule is type(rule):
            try:
                found += entry.trials(name)
            except ImportError:
                continue
    return tuple(found)
