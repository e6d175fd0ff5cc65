"""The last lines of a run: what it came to, and what to do next."""

from headway.cli import summary
from headway.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig

RESULT = {
    "steps": 7,
    "tokens": 7 * 512,
    "seconds": 2.0,
    "tokens_per_second": 1792.0,
    "skipped": 0,
    "parameters_total": 10,
    "parameters_active": 5,
    "first_val_bits_per_byte": 8.3,
    "val_bits_per_byte": 2.5,
    "sample": "",
    "checkpoint": "runs/x/checkpoints/step-000007",
    "report": "runs/x/report.html",
    "interrupted": False,
}


def lines(
    mesh: MeshConfig = MeshConfig(), data: DataConfig = DataConfig(), **changed: object
) -> list[str]:
    config = Config(model=ModelConfig(moe=MoEConfig(kind="dense")), data=data, mesh=mesh)
    return summary.train_summary(config, RESULT | changed, "runs/x").strip().splitlines()


def test_a_whole_run_ends_with_what_to_try():
    shown = lines()
    assert shown[0].startswith("done         7 steps, 3,584 tokens")
    assert "bits/byte    8.300 → 2.500 on validation text" in shown
    assert shown[-1] == "try          headway sample runs/x --prompt 'import '"


def test_a_world_has_items_to_try():
    shown = lines(data=DataConfig(source=("world:parity",)))
    assert shown[-1] == "try          headway eval runs/x --suite worlds"


def test_an_interrupted_run_ends_with_how_to_go_on():
    shown = lines(interrupted=True)
    assert shown[0].startswith("interrupted  7 steps")
    assert shown[-1] == "resume       headway train --resume runs/x"
    shown = lines(MeshConfig(dp=2, hp=2), interrupted=True)
    assert shown[-1].endswith(" torchrun --nproc-per-node 4 -m -- headway train --resume runs/x")


def test_a_run_that_was_evaluated_once_claims_no_progress():
    shown = lines(val_bits_per_byte=8.3, interrupted=True)
    assert not any("→" in line for line in shown)
    assert any("8.300 on validation text before the first step" in line for line in shown)
