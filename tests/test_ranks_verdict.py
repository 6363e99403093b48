"""Which cause the notes of ranks that failed together are taken for."""

import pytest

from batchnorm.ranks.verdict import Evidence, Note, Saw

FORWARD, NEXT, BACKWARD = (
    "the forward of Net.bn1",
    "the forward of Net.bn2",
    "the backward of Net.bn1",
)
DIED = (
    "died, was killed, or raised an error of its own, which its log tells; or it ended before the "
    "others, out of batches or in eval mode"
)


def verdict(mine, theirs, ranks=4, me=0, **known):
    notes = {me: mine, **theirs}
    return Evidence(tuple(range(ranks)), me, notes, **known).verdict()


def test_who_left_no_note_is_gone_where_a_connection_was_closed():
    closed = Note(FORWARD, Saw.CLOSED)
    assert verdict(closed, {1: closed, 3: closed}) == f"rank 2 is gone. It {DIED}"
    assert verdict(closed, {1: closed}) == f"ranks 2, 3 are gone. One of them {DIED}"
    # what others were doing is told beside it
    elsewhere = verdict(closed, {1: closed, 3: Note(NEXT, Saw.CLOSED)})
    assert elsewhere == f"rank 2 is gone; rank 3 was in {NEXT}. It {DIED}"


def test_without_a_store_what_is_known_is_told(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    closed = Note(FORWARD, Saw.CLOSED)
    said = verdict(closed, {}, me=1, answered=False)
    assert said.startswith("rank 0 is gone, and with it the store that would tell of others. One")
    said = verdict(closed, {}, ranks=2, answered=False)
    assert said == f"rank 1 is gone. It {DIED}"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # the store is no rank's
    said = verdict(closed, {}, me=1, answered=False)
    assert said.startswith("one of ranks 0, 2, 3 is gone; the store that tells which does not")


@pytest.mark.parametrize("mine", [Saw.LATE, Saw.CLOSED])
def test_one_who_waited_for_the_limit_knows_better_than_whom_it_left(mine):
    """Who times out closes its connections, and others see but that."""
    said = verdict(Note(FORWARD, mine), {1: Note(FORWARD, Saw.LATE), 2: Note(FORWARD, Saw.CLOSED)})
    assert said.startswith("rank 3 did not come within the group's time limit. It may be in eval")
    assert "batches" in said
    said = verdict(Note(BACKWARD, mine), {1: Note(BACKWARD, Saw.LATE)})
    assert said.startswith("ranks 2, 3 did not come within the group's time limit. They may have")
    assert "loss" in said


def test_who_came_when_others_had_waited_is_late():
    late, closed = Note(FORWARD, Saw.LATE), Note(FORWARD, Saw.CLOSED)
    said = verdict(late, {1: late, 2: closed, 3: late})
    assert said.startswith(
        "rank 2 came later than the group's time limit allows. Find what held it"
    )
    said = verdict(closed, {1: late, 2: late, 3: late})
    assert said.startswith("rank 0, this one, came later than the group's time limit")
    said = verdict(late, {1: closed, 2: closed, 3: late})
    assert said.startswith("ranks 1, 2 came later")


def test_where_all_were_there_it_was_the_network():
    for saw in (Saw.LATE, Saw.CLOSED):
        note = Note(FORWARD, saw)
        said = verdict(note, {1: note, 2: note, 3: note})
        assert said == "all ranks were there. The network between them failed"


def test_ranks_in_other_layers_are_told_by_layer():
    mixed = Note(FORWARD, Saw.MIXED)
    said = verdict(mixed, {1: mixed, 2: Note(NEXT, Saw.MIXED), 3: Note(NEXT, Saw.MIXED)})
    assert said.startswith(f"ranks 2, 3 were in {NEXT}. The ranks' models differ, or one of them")
    assert "loss" not in said
    said = verdict(mixed, {1: mixed}, others=(2, 3))  # whose notes did not come
    assert said.startswith("ranks 2, 3 were in another layer. ")
    said = verdict(Note(BACKWARD, Saw.LATE), {i: Note(FORWARD, Saw.LATE) for i in (1, 2, 3)})
    assert said.startswith(f"ranks 1, 2, 3 were in {FORWARD}. ")
    assert said.endswith("or left a layer out of its loss")


def test_what_the_backend_refuses_is_told_in_its_words():
    refused = Note(FORWARD, Saw.OTHER, "No backend type associated with device type cpu")
    assert verdict(refused, {}) == refused.words
    said = verdict(Note(FORWARD, Saw.LATE), {1: refused})
    assert said == f"on rank 1, {refused.words}"


def test_a_layer_of_another_width_on_another_rank_is_told():
    mixed = Note(FORWARD, Saw.MIXED)
    said = verdict(mixed, {1: mixed}, ranks=2, others=(1,))
    assert said.startswith("rank 1 sent another width of it. The ranks' models differ, or one")
