"""One description of a tensor's place, read in both directions."""

import pytest
import torch

from headway.hub.layout import dense_rows, expert_rows, fused_expert_rows, interleaved_expert_rows

H, E, G, F, D = 1, 3, 2, 5, 4
OURS = {
    "x.w_in_HEGFL": torch.arange(H * E * G * F * D).view(H, E, G, F, D),
    "x.w_out_HEFL": torch.arange(H * E * F * D).view(H, E, F, D),
    "x.b_in_HEGF": torch.arange(H * E * G * F).view(H, E, G, F),
    "x.b_out_HEL": torch.arange(H * E * D).view(H, E, D),
    "x.w_in.weight": torch.arange(G * F * D).view(G * F, D),
    "x.w_out.weight": torch.arange(F * D).view(D, F),
}
W_IN, W_OUT = OURS["x.w_in_HEGFL"][0], OURS["x.w_out_HEFL"][0]


def theirs(rows):
    return {row.theirs: written(row) for row in rows}


def written(row):
    """Their tensor."""
    ours = OURS[row.ours]
    return row.write(ours[row.region(tuple(ours.shape))], tuple(ours.shape))


def test_experts_one_by_one():
    tensors = theirs(expert_rows("m", "x", E, ("w1", "w3", "w2")))
    for e in range(E):
        assert torch.equal(tensors[f"m.{e}.w1.weight"], W_IN[e, 0])
        assert torch.equal(tensors[f"m.{e}.w3.weight"], W_IN[e, 1])
        assert torch.equal(tensors[f"m.{e}.w2.weight"], W_OUT[e].T)


def test_experts_fused_and_interleaved():
    tensors = theirs(fused_expert_rows("m", "x"))
    assert torch.equal(tensors["m.gate_up_proj"], torch.cat([W_IN[:, 0], W_IN[:, 1]], 1))
    assert torch.equal(tensors["m.down_proj"], W_OUT.transpose(1, 2))
    tensors = theirs(interleaved_expert_rows("m", "x"))
    assert torch.equal(tensors["m.gate_up_proj"][..., ::2], W_IN[:, 0].transpose(1, 2))
    assert torch.equal(tensors["m.gate_up_proj"][..., 1::2], W_IN[:, 1].transpose(1, 2))
    assert torch.equal(tensors["m.gate_up_proj_bias"][..., 1::2], OURS["x.b_in_HEGF"][0, :, 1])
    assert torch.equal(tensors["m.down_proj"], W_OUT)
    assert torch.equal(tensors["m.down_proj_bias"], OURS["x.b_out_HEL"][0])


def test_dense():
    tensors = theirs(dense_rows("m", "x"))
    assert torch.equal(tensors["m.up_proj.weight"], OURS["x.w_in.weight"][F:])
    assert torch.equal(tensors["m.down_proj.weight"], OURS["x.w_out.weight"])


@pytest.mark.parametrize(
    "rows",
    [
        [*expert_rows("m", "x", E)],
        [*fused_expert_rows("m", "x")],
        [*interleaved_expert_rows("m", "x")],
        [*dense_rows("m", "x")],
    ],
)
def test_reading_inverts_writing_and_every_element_has_one_place(rows):
    for name in {row.ours for row in rows}:
        ours = OURS[name]
        again, times = torch.zeros_like(ours), torch.zeros_like(ours)
        for row in rows:
            if row.ours == name:
                tensor = written(row)
                assert tensor.shape == row.shape(tuple(ours.shape))
                region = row.region(tuple(ours.shape))
                again[region] = row.read(tensor, tuple(ours.shape))
                times[region] += 1
        assert torch.equal(again, ours) and (times == 1).all()
