"""Is LatentMoE-eff as good as a flat mixture for less, and LatentMoE-acc better for as much?

Experts on half the width (α = 2): `eff` has twice as many experts and as many of a token at half
their cost, `acc` twice as many of a token too, less those that pay for the projections (arXiv
2601.18089). Executed FLOPs of training are equal, so that `eff` reads more tokens."""

from headway.config import latent_acc, latent_eff
from headway.lab.experiment import Arm
from headway.lab.statistics import Region
from headway.lab.study import Claim, Contrast, Study
from studies.narrow import ACTIVE, CORPUS, WIDTH, mixture, series

STEPS, SEEDS, MARGIN = 1000, (101, 102, 103, 104), 0.01
EXPERTS, TOP_K, ALPHA = 32, 8, 2
F = ACTIVE // TOP_K


def latent(name: str, n_experts: int, top_k: int) -> Arm:
    """Return a LatentMoE whose router reads the token."""
    return mixture(
        name,
        n_experts,
        top_k,
        F * top_k,
        model__moe__kind="latent",
        model__moe__d_latent=WIDTH // ALPHA,
        model__moe__router__reads="token",
    )


ARMS = (
    mixture("flat", EXPERTS, TOP_K),
    latent("eff", *latent_eff(EXPERTS, TOP_K, ALPHA)),
    latent("acc", *latent_acc(EXPERTS, TOP_K, ALPHA, F, WIDTH, "swiglu")),
)


def claim(arm: str, region: Region, margin: float, text: str) -> Claim:
    """Return a claim on a difference to the flat mixture."""
    contrast = (Contrast(arm, "flat", STEPS),)
    source = "arXiv 2601.18089"
    return Claim(arm, text, source, contrast, region, CORPUS, margin, len(SEEDS))


STUDY = Study(
    "latent_eff_acc",
    "Is a LatentMoE as good for less, and better for as much?",
    (series(ARMS, STEPS, SEEDS),),
    (
        claim("eff", "equal", MARGIN, "eff is as good as flat, to 0.01 bits per byte"),
        claim("acc", "better", 0.0, "acc is better than flat"),
    ),
    notes="Models of width 32 and 1M bytes of Python. Experts of a LatentMoE on half the width: "
    "`eff` has twice as many, as many of them per token as flat, at half their cost; `acc` has "
    "twice as many per token too, less those that pay for the projections.",
)
