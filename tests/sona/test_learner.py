"""The learner thread with real journal, store, gates and solver over a made-up model."""

import asyncio
import threading

import pytest
from support.school import School, school

from adapters.errors import SnapshotCorrupt, StoreUnwritable
from adapters.table import TableLimits
from engine.errors import InvalidJob
from sona.errors import DiskFull, ShuttingDown
from sona.journal import FeedbackState, Verdict
from sona.loops import instant
from sona.loops.lessons import MAX_POSITIONS


async def test_a_correction_is_learned_from_a_pass_over_it(tmp_path):
    async with school(tmp_path) as here:
        name = await here.teach(5, 6, 7)
        assert here.state_of(name) == "LEARNED"
        (info,) = here.store.history(here.slot())
        assert info.report["num_edits"] == 3
        assert info.report["num_failing"] == 0


async def test_restoring_a_version_brings_its_feedback_back(tmp_path):
    async with school(tmp_path) as here:
        first, second = await here.teach(5), await here.teach(6)
        slot, teacher = here.slot(), here.loop.teacher
        undone = await here.on_learner(lambda: teacher.roll_back(slot, 1, "a mistake"))
        assert [record.feedback_id for record in undone] == [second]
        assert (here.state_of(first), here.state_of(second)) == ("LEARNED", "ROLLED_BACK")
        assert here.journal.feedback("acme", second).reason == "a mistake"

        undone = await here.on_learner(lambda: teacher.roll_back(slot, 2, ""))
        assert undone == ()
        assert here.state_of(second) == "LEARNED"
        assert here.journal.feedback("acme", second).reason == ""
        await here.teach(8)  # folds the log anew: the restored correction is in it
        assert here.store.history(slot)[-1].report["num_edits"] == 3


@pytest.mark.parametrize("learns", [True, False])
async def test_a_rollback_that_a_crash_cut_off_is_finished(tmp_path, learns):
    async with school(tmp_path) as here:
        first, second = await here.teach(5), await here.teach(6)
        here.store.rollback(here.slot(), 1, report={"reason": "a mistake"})  # and no journal
    async with school(tmp_path, learns=learns) as here:
        assert (here.state_of(first), here.state_of(second)) == ("LEARNED", "ROLLED_BACK")
        assert here.journal.feedback("acme", second).reason == "a mistake"


async def test_what_was_learned_from_another_model_waits_for_it(tmp_path):
    async with school(tmp_path) as here:
        kept = await here.teach(5)
    async with school(tmp_path, base_hash="base-2") as here:
        late = here.correct(6)  # its answer is of base-1
        here.loop.notify(late)
        await here.on_learner(lambda: None)
        assert here.state_of(late.feedback_id) == "ACCEPTED"
        assert here.engine.num_passes == 0
    async with school(tmp_path, starts=False) as here:
        async with here.settled() as events:
            here.loop.start(learns=True)
            assert (await anext(events)).feedback_id == late.feedback_id
        assert here.store.history(here.slot())[-1].feedback_seqs == (1, late.seq)
        assert here.state_of(kept) == "LEARNED"


async def test_few_passes_are_under_way_at_once(tmp_path):
    async with school(tmp_path) as here:
        here.engine.gate.clear()
        async with here.settled() as events:
            for token in range(5, 15):
                here.loop.notify(here.correct(token))
            await here.on_learner(lambda: None)
            here.engine.gate.set()
            learned = {(await anext(events)).feedback_id for _ in range(10)}
        assert learned == {f"f{i}" for i in range(1, 11)}
        assert here.engine.most_running == 4


async def test_a_failure_that_may_pass_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(instant, "_RETRY_S", 0.01)
    async with school(tmp_path) as here:
        here.engine.failures = [DiskFull("no room"), DiskFull("no room")]
        async with here.settled() as events:
            here.loop.notify(here.correct(5))
            kinds = [(await anext(events)).kind.name for _ in range(3)]
        assert kinds == ["LEARNING_FAILED", "LEARNING_FAILED", "FEEDBACK_LEARNED"]


async def test_what_can_never_run_is_rejected_with_its_reason(tmp_path):
    async with school(tmp_path) as here:
        here.engine.failures = [InvalidJob("9000 tokens; the context holds 2048")]
        name = await here.teach(5)
        assert here.state_of(name) == "REJECTED"
        assert "9000 tokens" in here.journal.feedback("acme", name).reason
        assert here.journal.pending() == ()


async def test_a_bug_ends_one_lesson_and_not_the_learner(tmp_path):
    async with school(tmp_path) as here:
        here.engine.failures = [ZeroDivisionError("a bug")]
        assert here.state_of(await here.teach(5)) == "ACCEPTED"
        assert here.state_of(await here.teach(6)) == "LEARNED"
        assert here.loop.teacher.counts.num_failed == 1
    async with school(tmp_path, starts=False) as here, here.settled() as events:
        here.loop.start(learns=True)
        assert (await anext(events)).feedback_id == "f1"  # the next start tries again


async def test_a_long_answer_says_how_much_of_it_is_learned(tmp_path):
    num = MAX_POSITIONS + 20
    roomy = TableLimits(max_tokens=2 * MAX_POSITIONS)
    async with school(tmp_path, limits=roomy) as here:
        await here.teach(5)
        name = await here.teach(*[1] * num, signal=Verdict(is_pass=True))
        record = here.journal.feedback("acme", name)
        assert record.state is FeedbackState.LEARNED
        assert record.reason.startswith(f"{MAX_POSITIONS} of {num} tokens")
        positions = here.journal.positions(record.seq)
        assert positions is not None
        assert len(positions) == MAX_POSITIONS


async def test_a_confirmation_that_the_table_cannot_hold_is_not_called_learned(tmp_path):
    async with school(tmp_path) as here:  # 64 base tokens in a table, here a new one each time
        await here.teach(5)
        name = await here.teach(*[1] * 200, signal=Verdict(is_pass=True))
        record = here.journal.feedback("acme", name)
        assert record.state is FeedbackState.ACCEPTED
        assert "cannot hold some of its tokens" in record.reason


async def test_a_confirmation_that_is_contradicted_is_not_called_learned(tmp_path):
    async with school(tmp_path) as here:
        await here.teach(5)
        here.engine.constant = True  # one state for all answers
        confirmed = await here.teach(1, signal=Verdict(is_pass=True))
        assert here.state_of(confirmed) == "LEARNED"
        corrected = await here.teach(7)
        assert here.state_of(corrected) == "LEARNED"
        record = here.journal.feedback("acme", confirmed)
        assert record.state is FeedbackState.ACCEPTED
        assert "a later feedback contradicts it" in record.reason
        assert here.journal.feedback("acme", corrected).conflicts_with == (confirmed,)


async def test_what_does_not_hold_is_not_called_learned(tmp_path):
    async with school(tmp_path) as here:
        held = await here.teach(5, 6)
        assert here.state_of(held) == "LEARNED"
        here.engine.twins = True
        record = here.correct(7, 8)  # two answers to one state: one of them has to lose
        here.loop.notify(record)
        while here.store.history(here.slot())[-1].feedback_seqs != (1, record.seq):
            await here.on_learner(lambda: None)
        await here.on_learner(lambda: None)
        half = here.journal.feedback("acme", record.feedback_id)
        assert half.state is FeedbackState.ACCEPTED
        assert half.reason.startswith("in force in part")
        assert half.version == 2
        assert here.journal.pending() == ()

        slot, teacher = here.slot(), here.loop.teacher
        for version in (0, 2):  # undone, and brought back as what it was
            await here.on_learner(lambda to=version: teacher.roll_back(slot, to, ""))
        assert here.state_of(held) == "LEARNED"
        again = here.journal.feedback("acme", record.feedback_id)
        assert (again.state, again.reason) == (FeedbackState.ACCEPTED, half.reason)


async def test_what_truncation_lost_is_not_called_learned(tmp_path):
    async with school(tmp_path, limits=TableLimits(rank=2)) as here:
        names = [await here.teach(token, token + 40) for token in range(5, 13)]
        report = here.store.history(here.slot())[-1].report
        assert report["num_edits"] == 16
        assert report["num_edits_kept"] < 16
        assert report["lost"]
        for name in names:
            want = "ACCEPTED" if name in report["lost"] else "LEARNED"
            assert here.state_of(name) == want


async def test_who_is_contradicted_is_not_called_learned_until_that_is_undone(tmp_path):
    async with school(tmp_path) as here:
        here.engine.constant = True  # the same state whatever is asked
        first, second = await here.teach(7), await here.teach(8)
        assert (here.state_of(first), here.state_of(second)) == ("ACCEPTED", "LEARNED")
        assert "contradicts" in here.journal.feedback("acme", first).reason
        assert here.journal.feedback("acme", second).conflicts_with == (first,)
        await here.on_learner(lambda: here.loop.teacher.undo(here.slot(), ""))
        assert (here.state_of(first), here.state_of(second)) == ("LEARNED", "ROLLED_BACK")


async def two_halves(here):
    """Two corrections of two tokens, the second begun before the first was finished."""
    records = [here.correct(5, 6), here.correct(7, 8)]
    async with here.settled() as events:
        for record, token in zip(records, (5, 7), strict=True):
            here.begin(record, token)
        here.engine.gate.clear()
        for record in records:
            here.loop.notify(record)
        await here.on_learner(lambda: None)
        here.engine.gate.set()
        for _ in records:
            await anext(events)
    return [record.feedback_id for record in records]


async def test_undo_takes_back_one_correction_though_two_were_interleaved(tmp_path):
    async with school(tmp_path) as here:
        first, second = await two_halves(here)
        history = here.store.history(here.slot())
        assert [info.report["partial"] for info in history] == [
            [first], [first, second], [second], []
        ]  # fmt: skip
        undone = await here.on_learner(lambda: here.loop.teacher.undo(here.slot(), "a slip"))
        assert [record.feedback_id for record in undone] == [second]
        assert (here.state_of(first), here.state_of(second)) == ("LEARNED", "ROLLED_BACK")
        report = here.store.history(here.slot())[-1].report
        assert (report["num_edits"], report["partial"]) == (2, [])


async def test_a_version_with_half_a_correction_says_so(tmp_path):
    async with school(tmp_path) as here:
        first, second = await two_halves(here)
        slot, teacher = here.slot(), here.loop.teacher
        await here.on_learner(lambda: teacher.roll_back(slot, 1, ""))
        assert (here.state_of(first), here.state_of(second)) == ("ACCEPTED", "ROLLED_BACK")
        assert "only its beginning" in here.journal.feedback("acme", first).reason
        assert here.journal.pending() == ()
        await here.on_learner(lambda: teacher.roll_back(slot, 4, ""))
        assert (here.state_of(first), here.state_of(second)) == ("LEARNED", "LEARNED")


async def test_a_correction_rejected_halfway_leaves_nothing_behind(tmp_path):
    async with school(tmp_path) as here:
        kept, record = await here.teach(9), here.correct(5, 6)
        here.begin(record, 5)
        here.engine.failures = [InvalidJob("9000 tokens; the context holds 2048")]
        async with here.settled() as events:
            here.loop.notify(record)
            await anext(events)
        assert (here.state_of(kept), here.state_of(record.feedback_id)) == ("LEARNED", "REJECTED")
        assert here.store.history(here.slot())[-1].feedback_seqs == (1,)


async def test_a_rollback_takes_owed_sweeps_with_it(tmp_path):
    async with school(tmp_path) as here:
        await here.teach(5)
        slot, teacher = here.slot(), here.loop.teacher
        teacher._owing[slot] = None
        here.loop.pause("so that nothing is settled meanwhile")
        await here.on_learner(lambda: teacher.roll_back(slot, 0, ""))
        assert teacher.next_owing() is None


async def test_calls_are_refused_once_it_stops(tmp_path):
    here = School(tmp_path)
    here.loop.start(learns=True)
    await here.close()
    with pytest.raises(ShuttingDown):
        await here.on_learner(lambda: None)


async def test_paused_it_learns_nothing_and_catches_up(tmp_path):
    async with school(tmp_path) as here:
        here.loop.pause("maintenance")
        async with here.settled() as events:
            for token in (5, 6, 7):
                here.loop.notify(here.correct(token))
            await here.on_learner(lambda: None)
            assert here.engine.num_passes == 0
            here.loop.resume()
            learned = {(await asyncio.wait_for(anext(events), 30)).feedback_id for _ in range(3)}
        assert learned == {"f1", "f2", "f3"}


async def test_a_store_that_fails_in_the_second_lesson_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr(instant, "_RETRY_S", 0.01)
    async with school(tmp_path) as here:
        record = here.correct(5, 6, 7)
        here.begin(record, 5)
        put, errors = here.store.put, [StoreUnwritable("no room"), None]  # taken from the end

        def put_now_and_then(slot, draft):
            error = errors.pop() if errors else None
            if error is not None:
                raise error
            return put(slot, draft)

        monkeypatch.setattr(here.store, "put", put_now_and_then)
        async with here.settled() as events:
            here.loop.notify(record)
            kinds = [(await anext(events)).kind.name for _ in range(2)]
        assert kinds == ["LEARNING_FAILED", "FEEDBACK_LEARNED"]
        newest = here.store.history(here.slot())[-1]
        assert newest.report["num_edits"] == 3
        assert not newest.report["partial"]


async def test_giving_up_that_fails_neither_repeats_nor_ends_the_learner(tmp_path, monkeypatch):
    async with school(tmp_path) as here:
        await here.teach(5)
        record = here.correct(6, 7)
        here.begin(record, 6)
        here.engine.failures = [InvalidJob("9000 tokens; the context holds 2048")]
        asked = []

        def damaged(*args):
            asked.append(args)
            raise SnapshotCorrupt("version 1 does not match its checksum")

        monkeypatch.setattr(here.patterns, "rolled_back", damaged)
        async with here.settled() as events:
            here.loop.notify(record)
            while (await anext(events)).kind.name != "FEEDBACK_REJECTED":
                pass
        assert len(asked) == 1
        kept = here.journal.feedback("acme", record.feedback_id)
        assert kept.state is FeedbackState.REJECTED
        assert "still serves: version 1 does not match" in kept.reason
        assert here.loop.is_running
        assert here.state_of(await here.teach(8)) == "LEARNED"


async def test_a_rejection_that_raises_is_not_rejected_again(tmp_path, monkeypatch):
    async with school(tmp_path) as here:
        here.engine.failures = [InvalidJob("9000 tokens; the context holds 2048")]
        asked = []

        def damaged(record, reason):
            asked.append(reason)
            raise SnapshotCorrupt("version 1 does not match its checksum")

        monkeypatch.setattr(here.loop.teacher, "reject", damaged)
        await here.teach(5)
        await here.on_learner(lambda: None)
        assert len(asked) == 1
        assert here.loop.is_running


async def test_stopping_leaves_what_waits_to_the_next_start(tmp_path):
    async with school(tmp_path, starts=False) as here:
        for token in range(5, 25):
            here.begin(here.correct(token), token)
        reached, go_on = threading.Event(), threading.Event()
        first_lesson = here.loop.teacher.first_lesson

        def slow(record):
            reached.set()
            go_on.wait(10)
            return first_lesson(record)

        here.loop.teacher.first_lesson = slow
        here.loop.start(learns=True)
        await asyncio.to_thread(reached.wait, 10)
        stopping = asyncio.ensure_future(asyncio.to_thread(here.loop.stop))
        await asyncio.to_thread(here.loop._ending.wait, 10)
        go_on.set()
        await stopping
        states = [here.state_of(f"f{number}") for number in range(1, 21)]
        assert states == ["LEARNED", *["ACCEPTED"] * 19]


async def test_what_waited_in_a_pause_comes_before_what_comes_after(tmp_path, monkeypatch):
    async with school(tmp_path) as here:
        earlier, later = here.correct(5), here.correct(6)
        here.loop.pause("maintenance")
        here.loop.notify(earlier)
        at_inbox, get = threading.Event(), here.loop._inbox.get

        def get_and_tell(**how):
            at_inbox.set()
            return get(**how)

        monkeypatch.setattr(here.loop._inbox, "get", get_and_tell)
        await here.on_learner(at_inbox.clear)  # the thread has put the feedback aside
        await asyncio.to_thread(at_inbox.wait, 10)  # and has seen that it is paused
        async with here.settled() as events:
            here.loop._is_open.set()  # the moment between the two lines of `resume`
            here.loop.notify(later)
            here.loop.resume()
            names = [(await anext(events)).feedback_id for _ in range(2)]
        assert names == [earlier.feedback_id, later.feedback_id]
