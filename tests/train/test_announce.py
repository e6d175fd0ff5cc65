"""What is said before step 0."""

from headway.train.announce import oversubscribed


def test_a_crowded_machine_is_told_what_helps():
    assert "--run.threads 1" in oversubscribed(5.5, 2, 2, "") and "5.5 processes" in oversubscribed(
        5.5, 2, 2, ""
    )
    assert (
        oversubscribed(0.4, 2, 2, "")
        == oversubscribed(5.5, 2, 1, "")
        == oversubscribed(5.5, 2, 2, "PASSIVE")
        == ""
    )
