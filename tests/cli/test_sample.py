"""`headway sample`."""

from tests.command import call


def test_sample_streams_the_same_text_for_a_seed(run):
    args = ("sample", run, "--prompt", "def ", "--tokens", 12, "--json")
    first, second = call(*args), call(*args)
    answers = [dict(done.json) for done in (first, second)]
    assert all(answer.pop("tokens_per_second") > 0 for answer in answers)
    assert first.code == 0 and answers[0] == answers[1]
    assert first.out.startswith("def " + first.json["text"])
    greedy = [
        call("sample", run, "--temperature", 0, "--tokens", 5, "--seed", s, "--json").json["text"]
        for s in (0, 1)
    ]
    assert greedy[0] == greedy[1]
