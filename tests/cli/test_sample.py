"""`headway sample`."""

from tests.command import call


def test_sample_streams_the_same_text_for_a_seed(run):
    args = ("sample", run, "--prompt", "def ", "--tokens", 12, "--json")
    first, second = call(*args), call(*args)
    assert first.code == 0 and first.json == second.json
    assert first.out.startswith("def " + first.json["text"])
    greedy = [
        call("sample", run, "--temperature", 0, "--tokens", 5, "--seed", s, "--json").json["text"]
        for s in (0, 1)
    ]
    assert greedy[0] == greedy[1]
