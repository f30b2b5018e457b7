/*
 * A proposer's lanes between a Postgres and three to five safekeepers: whole runs, until all WAL has come everywhere.
 *
 * It checks after each wait that the lent state says what the lanes did, and nothing that did not come: positions, commit_lsn,
 * what is due, and who will do what the lanes have not; from time to time the ring; and in the end that nothing got lost.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proposer.h"

#define EPOCH_US 946684800000000	/* 2000-01-01 */
#define BEFORE (64 * 1024)		/* WAL that was there before the ring */
#define BEGIN_LSN UINT64_C(0x12345678)

/* The machine's processors were idle for more or less, as /proc/stat says. */
static void
time_passes(Proposal *run)
{
	char		text[300];
	uint64_t	before_ns = clock_ns,
				passed;
	uint64_t   *field = run->ticks;
	int			size;

	if (one_in(20))
		clock_ns += below(400000000);
	passed = clock_ns / 10000000 - before_ns / 10000000;
	for (int i = 0; i < 8; i++)
		field[i] += passed * below(i == 3 || i == 4 ? 20 : 100);
	size = snprintf(text, sizeof(text), "cpu  %lu %lu %lu %lu %lu %lu %lu %lu 0 0\ncpu0 1 2 3\n", field[0], field[1], field[2],
					field[3], field[4], field[5], field[6], field[7]);
	run->strange = one_in(1000);
	if (run->strange)
		mutate((uint8_t *) text, (size_t) size);
	require(ftruncate(run->statistics, 0) == 0 && pwrite(run->statistics, text, (size_t) size, 0) == size,
			"cannot write statistics");
}

/* What the proposer believes about the processors is what the statistics said at its last two looks. */
static void
check_look(Proposal *run)
{
	const Processors *processors = &run->proposer.processors;
	uint64_t	idle = run->ticks[3] + run->ticks[4],
				all = 0;

	for (int i = 0; i < 8; i++)
		all += run->ticks[i];
	require(processors->statistics >= 0 || run->strange || run->gave_up, "good statistics are no more looked at");
	run->gave_up = processors->statistics < 0;
	if (run->gave_up)
	{
		require(!processors->are_short, "processors are short, and nobody knows");
		run->crowded = false;
	}
	else if (processors->looked_ns != run->looked_ns)
	{
		require(run->looked_ns == 0 || processors->looked_ns - run->looked_ns >= 250000000, "looked too often");
		run->crowded = run->looked_ns != 0 && (idle - run->looked_idle) * 10 < all - run->looked_all;
		require(run->strange || (processors->idle_ticks == idle && processors->all_ticks == all),
				"something else is remembered than the statistics said");
		if (run->strange)
			run->crowded = processors->are_short;
		run->looked_ns = processors->looked_ns;
		run->looked_idle = processors->idle_ticks;
		run->looked_all = processors->all_ticks;
	}
	require(processors->are_short == run->crowded, "another shortage of processors than the statistics tell");
}

/* Whatever came, the lent state must now say what the lanes did. */
static void
check_state(Proposal *run, uint64_t before_end_lsn, uint64_t before_commit_lsn)
{
	const ProposerLane *proposer = &run->proposer;
	uint64_t	flush_lsns[MOST_MEMBERS];

	check_look(run);
	require(proposer->ring_end >= before_end_lsn && proposer->ring_end <= run->model_end_lsn, "WAL is taken that did not come");
	if (proposer->ring_end != before_end_lsn)
	{
		require(proposer->ring_end - proposer->commit_lsn <= proposer->room_bytes, "more WAL is taken than there is room for");
		require(proposer->ring_start == ring_start(run), "another beginning of the ring than its size and its end say");
		seen.wal_taken++;
		seen.rings_round += proposer->ring_end / proposer->ring_size != before_end_lsn / proposer->ring_size;
	}
	require(proposer->truncate_lsn <= proposer->commit_lsn, "truncate_lsn beyond commit_lsn");
	for (uint32_t i = 0; i < proposer->members; i++)
	{
		const ProposerMember *member = proposer->member[i];

		flush_lsns[i] = member->flush_lsn;
		require(member->sent_lsn <= proposer->ring_end && member->flush_lsn <= run->safekeepers[i].claimed_lsn,
				"a member has been sent, or has flushed, more than there is");
		require(member->sent_lsn >= run->safekeepers[i].lent_sent_lsn && member->flush_lsn >= run->safekeepers[i].lent_flush_lsn,
				"a member goes back");
		require(member->sent_lsn == run->safekeepers[i].lent_sent_lsn || member->told_commit_lsn >= before_commit_lsn,
				"an append counts as one that told of less");
		require(proposer->ring_end == before_end_lsn || member->sent_lsn == proposer->ring_end || member->awaiting ||
				member->mode == MEMBER_CLOSED || (proposer->lazy == i && proposer->lazy_due_ns != 0) ||
				(proposer->gather_due_ns != 0 && proposer->ring_end - member->sent_lsn < APPEND_MOST_BYTES) ||
				proposer->pump >> i & 1,
				"nobody will send a member what has come");
		require(member->told_commit_lsn <= proposer->commit_lsn, "a member was told of more than is committed");
	}
	require(proposer->commit_lsn == max_u64(before_commit_lsn, sorted_quorum_lsn(proposer, flush_lsns)),
			"another commit_lsn than the acknowledgements say");
	seen.commits += proposer->commit_lsn > before_commit_lsn;
	require((uint64_t) proposer->lane.due_ns == min_u64(U(proposer->gather_due_ns) - 1,
														min_u64(U(proposer->lazy_due_ns) - 1,
																U(proposer->broadcast_due_ns) - 1)) + 1,
			"another time is due than the first");
	require(proposer->gather_due_ns == 0 ||
			(proposer->gather_due_ns > run->waits_ns && proposer->gather_due_ns < (int64_t) clock_ns + proposer->gather_ns),
			"gathering takes longer than was said");
	if (proposer->gather_due_ns != 0 && proposer->gather_due_ns != run->gather_due_ns)
	{
		require(run->crowded, "WAL waits for more although processors are idle");
		seen.gathered++;
	}
	run->gather_due_ns = proposer->gather_due_ns;
	if (proposer->commit_lsn > before_commit_lsn)
		require(proposer->broadcast_due_ns != 0 || proposer->broadcast_due, "commit_lsn moved, and nobody will tell the members");
	if (proposer->commit_lsn > before_commit_lsn)
		require(proposer->statuses > 0 || proposer->status_due, "commit_lsn moved, and nobody tells Postgres");
}

/* Take over what the lanes did, as ProposerLanes.settle() and attend() do; before that, see that it is right. */
static void
settle(Proposal *run, uint64_t before_end_lsn, uint64_t before_commit_lsn)
{
	ProposerLane *proposer = &run->proposer;
	Lane	   *touched[MOST_LINKS];
	int			count = touched_lanes(run->loop, touched, MOST_LINKS);
	bool		wants = proposer->lane.wants;

	for (int i = 0; i < count; i++)
		if (touched[i] == &proposer->lane)
			wants = false;
	require(!wants, "Postgres's lane wants Python, and is not listed");
	run->progress |= proposer->ring_end != before_end_lsn || proposer->commit_lsn != before_commit_lsn;
	require(count > 0 || (proposer->ring_end == before_end_lsn && proposer->commit_lsn == before_commit_lsn),
			"something was done, and no lane is listed");
	for (uint32_t i = 0; i < proposer->members; i++)
	{
		Safekeeper *keeper = &run->safekeepers[i];
		const Lane *lane = &keeper->member->lane;

		answers_used(run, keeper, keeper->link.received + lane->received - lane->filled - keeper->link.held.size);
	}
	check_state(run, before_end_lsn, before_commit_lsn);
	for (uint32_t i = 0; i < proposer->members; i++)
	{
		Safekeeper *keeper = &run->safekeepers[i];
		ProposerMember *member = keeper->member;

		if (member->unsent > 0)
		{
			seen.sends_cut++;
			require(member->unsent <= member->message_bytes && member->mode == MEMBER_PYTHON, "a rest of no message");
			python_write(&keeper->link, member->message + member->message_bytes - member->unsent, member->unsent);
			member->unsent = 0;
		}
		seen.answers_taken += member->heard;
		member->heard = 0;
		count_and_hand_over(&keeper->link);
		keeper->full = keeper->link.queue.size > FULL_QUEUE;
	}
	if (proposer->unsent > 0)
		python_write(&run->postgres, proposer->status + STATUS_BYTES - proposer->unsent, proposer->unsent);
	proposer->unsent = 0;
	proposer->statuses = 0;
	proposer->lane.wants = 0;
	count_and_hand_over(&run->postgres);
	require(run->postgres.received - proposer->lane.filled - run->postgres.held.size <= run->xlog.parsed,
			"WAL is taken that is none");
	attend(run);
}

static void
check_ring(const Proposal *run)
{
	const ProposerLane *proposer = &run->proposer;

	for (uint64_t lsn = ring_start(run); lsn < proposer->ring_end; lsn++)
		require(proposer->ring[lsn % proposer->ring_size] == run->reference.at[lsn - run->reference_lsn],
				"the ring holds other bytes than Postgres sent");
}

/* Everything has come everywhere, and everybody knows. */
static bool
is_drained(const Proposal *run)
{
	uint64_t	end_lsn = run->proposer.ring_end;	/* a mutated length may have made more of it */

	if (end_lsn < run->end_lsn || run->told_lsn != end_lsn)
		return false;
	for (uint32_t i = 0; i < run->proposer.members; i++)
		if (run->safekeepers[i].received_lsn != end_lsn)
			return false;
	return true;
}

static void
begin_proposal(Proposal *run)
{
	static const size_t buffers[] = {300, 3000, 20000, 60000};
	static const size_t mosts[] = {100, 2000, 40000};
	ProposerLane *proposer = &run->proposer;

	*run = (Proposal)
	{
		.epoll_fd = epoll_create1(0), .mutates = one_in(2), .slow = one_in(3), .buffer_bytes = buffers[below(4)],
		.most_wal = mosts[below(3)]
	};
	run->loop = lane_loop_new(run->epoll_fd);
	require(run->epoll_fd >= 0 && run->loop != NULL, "no event loop");
	link_count = 0;
	run->reference_lsn = BEGIN_LSN - BEFORE + below(5000);
	run->first_lsn = run->next_lsn = run->model_end_lsn = BEGIN_LSN + below(200000);
	for (uint64_t lsn = run->reference_lsn; lsn < run->first_lsn; lsn++)
		*grow(&run->reference, 1) = (uint8_t) (lsn * 31);
	proposer->members = 3 + below(MOST_MEMBERS - 2);
	proposer->room_bytes = run->most_wal + below(one_in(2) ? 1000 : 5 * run->most_wal);
	run->reserve_bytes = 2 * (run->buffer_bytes + run->most_wal + 1000);
	proposer->ring_size = proposer->room_bytes + run->reserve_bytes;
	run->end_lsn = run->first_lsn + 1 + below(3 * proposer->ring_size);
	proposer->ring = allocate(proposer->ring_size);
	proposer->ring_end = run->first_lsn;
	proposer->term = TERM;
	proposer->generation = GENERATION;
	proposer->term_start_lsn = proposer->commit_lsn = proposer->truncate_lsn = run->first_lsn;
	proposer->applied_lsn = one_in(2) ? UINT64_MAX : run->first_lsn + below(proposer->ring_size);
	proposer->postgres_epoch_us = EPOCH_US;
	proposer->lazy_ns = 1 + below(2000000);
	proposer->lazy_bytes = one_in(3) ? 1000 : 50000;
	proposer->broadcast_ns = 1 + below(1000000);
	proposer->gather_ns = one_in(3) ? 0 : below(one_in(2) ? 2000000 : 50000000);
	proposer->processors.statistics = run->statistics = memfd_create("stat", 0);
	require(run->statistics >= 0, "no place for statistics");
	proposer->lazy = one_in(2) ? proposer->members : below(proposer->members);
	run->told_lsn = run->first_lsn;
	open_link(&run->postgres, run->loop, run->epoll_fd, &proposer->lane, proposer_lane_postgres_readable, proposer_lane_due,
			  run->buffer_bytes);
	for (uint32_t i = 0; i < proposer->members; i++)
	{
		Safekeeper *keeper = &run->safekeepers[i];
		ProposerMember *member = keeper->member = proposer->member[i] = member_at(i);

		member->slot = i;
		member->proposer = proposer;
		/* one may be behind what the ring holds */
		member->sent_lsn = member->flush_lsn = i == 0 && one_in(3) ? run->first_lsn - below(50000) : run->first_lsn;
		keeper->received_lsn = keeper->flush_lsn = keeper->claimed_lsn = member->sent_lsn;
		open_link(&keeper->link, run->loop, run->epoll_fd, &member->lane, proposer_lane_member_readable, NULL,
				  one_in(2) ? 100 : 1000);
	}
	choose_voters(proposer, true);
}

static void
end_proposal(Proposal *run)
{
	close_link(&run->postgres);
	for (uint32_t i = 0; i < run->proposer.members; i++)
	{
		Safekeeper *keeper = &run->safekeepers[i];

		close_link(&keeper->link);
		release(&keeper->answers.wire);
		release(&keeper->appends);
	}
	lane_loop_free(run->loop);
	require(run->proposer.lane.loop == NULL, "a lane of a loop that is no more");
	(void) close(run->epoll_fd);
	(void) close(run->statistics);
	release(&run->xlog.wire);
	release(&run->reference);
	release(&run->statuses);
	free(run->proposer.ring);
}

void
fuzz_proposer(void)
{
	static Proposal run;
	const int	patience = 400;

	begin_proposal(&run);
	for (int round = 0; round < 20000 && run.idle < patience && !is_drained(&run); round++)
	{
		LaneEvent	found[MOST_LINKS];
		uint64_t	end_lsn = run.proposer.ring_end,
					commit_lsn = run.proposer.commit_lsn;
		int			count;

		run.progress = false;
		if (round > 5000)
			run.mutates = false;	/* an end must come */
		if (!one_in(3))
			postgres_sends(&run);
		if (one_in(run.slow && run.idle == 0 ? 40 : 2))
			postgres_reads(&run);
		for (uint32_t i = 0; i < run.proposer.members; i++)
		{
			if (one_in(run.slow && run.idle == 0 ? 6 : 2))
				safekeeper_reads(&run, &run.safekeepers[i]);
			if (!one_in(3))
				safekeeper_answers(&run, &run.safekeepers[i]);
		}
		lend(&run);
		time_passes(&run);
		run.waits_ns = (int64_t) clock_ns;
		count = wait_for_events(run.loop, found, one_in(10) ? 1 : MOST_LINKS);
		settle(&run, end_lsn, commit_lsn);
		python_takes_wal(&run);
		python_check_room(&run);
		python_reads(&run, found, count);
		python_takes_wal(&run);
		for (uint32_t i = 0; i < run.proposer.members; i++)
		{
			Safekeeper *keeper = &run.safekeepers[i];

			python_takes_answers(&run, keeper);
			if (keeper->full && keeper->link.queue.size == 0)
			{
				keeper->full = false;
				python_pump(&run, keeper);
			}
			/* heartbeats bring what nothing else does */
			if (run.idle % 50 == 49)
			{
				python_append(&run, keeper, 0);
				python_pump(&run, keeper);
			}
		}
		python_check_room(&run);
		run.idle = run.progress ? 0 : run.idle + 1;
		if (one_in(100))
			check_ring(&run);
	}
	check_ring(&run);
	require(is_drained(&run), "not all of the WAL came everywhere");
	end_proposal(&run);
}
