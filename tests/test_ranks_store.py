from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from batchnorm.ranks.store import LARGEST, Board, Patience


@pytest.fixture(params=["hash", "tcp"])
def boards(request):
    """Three ranks' boards on one store; over TCP each has a connection, as processes have."""
    if request.param == "hash":
        stores = [dist.HashStore()] * 3
    else:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2)]
        stores = [server, *clients]
    return [Board(store, rank, 3, "tests") for rank, store in enumerate(stores)]


def test_a_note_is_read_by_all_and_replaced_by_the_next(boards):
    first, second, third = boards
    note = bytes(range(256))
    assert first.read("note", 1) is None
    second.pin("note", note)
    first.collect("note", Patience(60.0), [1])  # sent, and not waited for
    assert [board.read("note", 1) for board in boards] == [note] * 3
    assert third.read("note", 0) is None
    second.pin("note", b"")
    assert second.read("note", 1) == b""
    second.take_down("note")
    second.take_down("note")
    assert second.read("note", 1) is None


def test_a_note_that_would_end_the_connection_is_refused(boards):
    with pytest.raises(ValueError, match=f"at most {LARGEST} bytes, got {LARGEST + 1} for 'x'"):
        boards[1].pin("x", bytes(LARGEST + 1))
    boards[1].pin("x", bytes(LARGEST))
    assert boards[2].collect("x", Patience(60.0), [1]) == {1: bytes(LARGEST)}


def test_topics_do_not_see_each_other():
    store = dist.HashStore()
    one, other = (Board(store, 0, 1, topic) for topic in ("one", "other"))
    one.pin("note", b"1")
    assert other.read("note", 0) is None


def test_those_who_come_in_time_are_collected(boards):
    first, second, third = boards
    second.pin("note", b"2")
    first.collect("note", Patience(60.0), [1])
    started = time.monotonic()
    assert first.collect("note", Patience(0.3)) == {1: b"2"}
    assert time.monotonic() - started < 5
    late = threading.Timer(0.2, lambda: (third.pin("note", b"3"), first.pin("note", b"1")))
    late.start()
    assert first.collect("note", Patience(60.0)) == {0: b"1", 1: b"2", 2: b"3"}
    assert first.collect("note", Patience(0.0), [2]) == {2: b"3"}


def test_patience_is_cut_from_another_thread(boards):
    patience = Patience(600.0)
    patience.cut(900.0)  # it only grows shorter
    assert not patience.is_over
    threading.Timer(0.2, patience.cut, [0.0]).start()
    started = time.monotonic()
    assert boards[0].collect("note", patience) == {}
    assert time.monotonic() - started < 60


def test_one_of_all_claims(boards):
    boards[0].await_claim("report", Patience(0.1))
    with ThreadPoolExecutor(3) as threads:
        won = list(threads.map(lambda board: board.claim("report"), boards))
    assert sum(won) == 1
    assert [board.claim("report") for board in boards] == won
    boards[1].await_claim("report", Patience(600.0))  # which it need not
    boards[2].release("report")
    assert boards[2].claim("report")
    assert not boards[0].claim("report")
    boards[1].await_claim("report", Patience(600.0))


def met(boards, wait: float, *, late: dict[int, float] | None = None, failing: int | None = None):
    """What each rank gets of a meeting, or raises."""

    def come(board: Board):
        time.sleep((late or {}).get(board.rank, 0.0))
        try:
            if board.rank == failing:
                return board.fail("meeting", "ValueError: no data")
            return board.meet("meeting", b"note %d" % board.rank, wait)
        except (RuntimeError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(len(boards)) as threads:
        return list(threads.map(come, boards))


def test_all_go_on_together(boards):
    assert met(boards, 60.0, late={2: 0.3}) == [[b"note 0", b"note 1", b"note 2"]] * 3


@pytest.mark.parametrize("absent", [0, 1])
def test_who_did_not_come_is_named_on_those_who_did(boards, absent):
    there = [board for board in boards if board.rank != absent]
    said = f"TimeoutError: rank {absent} of 3 did not come within 0.3 seconds"
    assert met(there, 0.3) == [said] * 2


def test_who_comes_too_late_is_told_so(boards):
    first, second, third = met(boards, 0.3, late={1: 1.0})
    assert first == third == "TimeoutError: rank 1 of 3 did not come within 0.3 seconds"
    told = "TimeoutError: rank 1 of 3 came after 0.3 seconds, when the others had gone on"
    assert second == told


def test_the_first_comes_when_the_others_have_given_up(boards):
    answers = met(boards, 0.3, late={0: 2.5})
    assert answers[0] == "TimeoutError: ranks 1, 2 of 3 did not come within 0.3 seconds"
    assert answers[1:] == ["TimeoutError: rank 0 of 3 did not come within 0.3 seconds"] * 2


@pytest.mark.parametrize("failing", [0, 2])
def test_nobody_waits_for_one_that_failed(boards, failing):
    started = time.monotonic()
    answers = met(boards, 60.0, failing=failing)
    assert time.monotonic() - started < 30
    said = f"RuntimeError: rank {failing} of 3 failed with ValueError: no data"
    assert answers == [None if rank == failing else said for rank in range(3)]


def test_without_torchrun_there_is_no_board(monkeypatch):
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Board.of_torchrun("run") is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Board.of_torchrun("run") is None  # another launcher, such as srun
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert Board.of_torchrun("run") is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Board.of_torchrun("run") is None


def test_torchrun_s_store_is_the_same_for_its_ranks_and_another_after_a_restart(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {"USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def board(rank: int) -> Board:
        monkeypatch.setenv("RANK", str(rank))
        return Board.of_torchrun("run")

    first, second = board(0), board(1)
    assert (first.rank, second.rank, second.size) == (0, 1, 2)
    second.pin("note", b"2")
    assert first.collect("note", Patience(60.0), [1]) == {1: b"2"}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert board(0).read("note", 1) is None
