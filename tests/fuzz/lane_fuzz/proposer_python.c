/*
 * Python's part of a proposer, as short as it can be: what ProposerLanes lends to the lanes, and all that they leave.
 *
 * It checks that what they leave follows what they took.
 */
#include <string.h>
#include <sys/epoll.h>

#include "proposer.h"

static void
python_status(Proposal *run)
{
	Bytes		status = {0};
	uint64_t	commit_lsn = run->proposer.commit_lsn;

	add_fields(&status, 1, U('d'), 4, U(STATUS_BYTES - 1), 1, U('r'), 8, commit_lsn, 8, commit_lsn, 8, commit_lsn, 8, U(0), 1,
			   U(0), 0);
	python_write(&run->postgres, status.at, status.size);
	release(&status);
}

void
python_append(Proposal *run, Safekeeper *keeper, size_t size)
{
	ProposerMember *member = keeper->member;
	Bytes		append = {0};

	add_fields(&append, 1, U('d'), 4, U(APPEND_FRAME - 1 + size), 1, U('a'), 4, U(GENERATION), 8, U(TERM), 8,
			   member->sent_lsn, 8, member->sent_lsn + size, 8, run->proposer.commit_lsn, 8, run->proposer.truncate_lsn, 0);
	add(&append, run->reference.at + (member->sent_lsn - run->reference_lsn), size);
	member->sent_lsn += size;
	member->told_commit_lsn = run->proposer.commit_lsn;
	member->awaiting = 1;
	python_write(&keeper->link, append.at, append.size);
	release(&append);
}

void
python_pump(Proposal *run, Safekeeper *keeper)
{
	while (!keeper->full && keeper->member->sent_lsn < run->proposer.ring_end)
	{
		uint64_t	pending = run->proposer.ring_end - keeper->member->sent_lsn;

		python_append(run, keeper, pending < APPEND_MOST_BYTES ? pending : APPEND_MOST_BYTES);
		keeper->full = keeper->link.queue.size > FULL_QUEUE;
	}
}

static void
python_commits(Proposal *run)
{
	ProposerLane *proposer = &run->proposer;
	uint64_t	flush_lsns[MOST_MEMBERS];
	uint64_t	commit_lsn;

	for (uint32_t i = 0; i < proposer->members; i++)
		flush_lsns[i] = proposer->member[i]->flush_lsn;
	commit_lsn = sorted_quorum_lsn(proposer, flush_lsns);
	if (commit_lsn > proposer->commit_lsn)
	{
		proposer->commit_lsn = commit_lsn;
		python_status(run);
	}
}

void
python_check_room(Proposal *run)
{
	const ProposerLane *proposer = &run->proposer;
	uint64_t	uncommitted = proposer->ring_end - proposer->commit_lsn;
	bool		paused = run->postgres.paused;

	if (uncommitted > proposer->ring_size - run->reserve_bytes / 2)
		paused = true;
	else if (uncommitted < proposer->room_bytes)
		paused = false;
	if (paused != run->postgres.paused)
	{
		run->postgres.paused = paused;
		watch(&run->postgres);
	}
}

/* The messages that the lane left: WAL goes into the ring, and the rest is nothing here. */
void
python_takes_wal(Proposal *run)
{
	ProposerLane *proposer = &run->proposer;
	Bytes	   *held = &run->postgres.held;
	size_t		size;

	while (held->size > 0 && run->postgres.received - held->size < run->xlog.parsed &&
		   (size = whole_message(held->at, held->size)) != 0)
	{
		if (held->at[5] == 'w')
		{
			require(number(held->at + 6, 8) == proposer->ring_end, "WAL is left that does not follow what was taken");
			if (size > XLOG_HEAD + run->most_wal)
			{
				(void) is_broken(&run->xlog);	/* a length that was mutated */
				break;
			}
			require(proposer->ring_end + size - XLOG_HEAD - proposer->commit_lsn <= proposer->ring_size,
					"the driver's Postgres sends more than the ring takes");
			for (size_t i = XLOG_HEAD; i < size; i++)
				proposer->ring[proposer->ring_end++ % proposer->ring_size] = held->at[i];
		}
		drop(held, size);
		run->progress = true;
	}
	if (run->xlog.mutated && (run->xlog.broken || run->idle > 20) && one_in(4))
	{
		lose_wire(&run->xlog, &run->postgres);
		/* as ProposerLanes.lend() without Postgres */
		for (uint32_t i = 0; proposer->gather_due_ns != 0 && i < proposer->members; i++)
			python_pump(run, &run->safekeepers[i]);
		proposer->gather_due_ns = proposer->lazy_due_ns = proposer->broadcast_due_ns = 0;
		run->next_lsn = run->model_end_lsn = proposer->ring_end;
		run->progress = true;
	}
}

void
python_takes_answers(Proposal *run, Safekeeper *keeper)
{
	Bytes	   *held = &keeper->link.held;
	size_t		size;

	while (held->size > 0 && keeper->link.received - held->size < keeper->answers.parsed &&
		   (size = whole_message(held->at, held->size)) != 0)
	{
		ProposerMember *member = keeper->member;
		uint64_t	flush_lsn = number(held->at + 18, 8);

		answers_used(run, keeper, keeper->link.received - held->size + size);
		if (is_answer(held->at, size) && flush_lsn <= member->sent_lsn)
		{
			member->flush_lsn = max_u64(member->flush_lsn, flush_lsn);
			memcpy(member->standby, held->at + 34, PROPOSER_STANDBY_BYTES);
			member->awaiting = 0;
			python_commits(run);
		}
		drop(held, size);
		run->progress = true;
	}
	if (keeper->answers.mutated && (keeper->answers.broken || run->idle > 20) && one_in(4))
	{
		lose_wire(&keeper->answers, &keeper->link);
		keeper->asked = true;
		keeper->member->awaiting = 0;
		run->progress = true;
	}
}

/* The oldest position that the ring still holds. */
uint64_t
ring_start(const Proposal *run)
{
	const ProposerLane *proposer = &run->proposer;

	return proposer->ring_end < run->first_lsn + proposer->ring_size ? run->first_lsn : proposer->ring_end - proposer->ring_size;
}

void
lend(Proposal *run)
{
	ProposerLane *proposer = &run->proposer;

	proposer->ring_start = ring_start(run);
	proposer->paused = run->postgres.paused;
	if (one_in(30))
		proposer->lazy = one_in(2) ? proposer->members : below(proposer->members);
	proposer->lane.open = run->postgres.held.size == 0 && !run->postgres.paused;
	for (uint32_t i = 0; i < proposer->members; i++)
	{
		Safekeeper *keeper = &run->safekeepers[i];
		ProposerMember *member = keeper->member;

		member->active = !one_in(30);
		member->mode = keeper->full || !member->active ? MEMBER_CLOSED : one_in(30) ? MEMBER_PYTHON : MEMBER_DIRECT;
		keeper->lent_sent_lsn = member->sent_lsn;
		keeper->lent_flush_lsn = member->flush_lsn;
		member->lane.open = member->active && keeper->link.held.size == 0;
	}
	/* timers that Python had: both, one of them, or none after all */
	if (one_in(20))
	{
		int64_t		at_ns = (int64_t) clock_ns + below(3000000) - 1000000;

		proposer_lane_arm(proposer, one_in(2) ? at_ns : 0, one_in(2) ? at_ns + below(3000000) : 0);
	}
}

/* What the lanes left to Python, but for bytes. */
void
attend(Proposal *run)
{
	ProposerLane *proposer = &run->proposer;
	uint32_t	pump = proposer->pump;

	proposer->pump = 0;
	if (proposer->status_due)
		python_status(run);
	proposer->status_due = 0;
	for (uint32_t i = 0; i < proposer->members; i++)
	{
		Safekeeper *keeper = &run->safekeepers[i];

		if (proposer->broadcast_due && keeper->member->told_commit_lsn < proposer->commit_lsn)
			python_append(run, keeper, 0);
		if (pump >> i & 1)
			python_pump(run, keeper);
	}
	proposer->broadcast_due = 0;
}

/* The events that the lanes did not take. */
void
python_reads(Proposal *run, const LaneEvent *found, int count)
{
	for (int i = 0; i < count; i++)
		for (int k = 0; k < link_count; k++)
		{
			Link	   *link = links[k];

			if (link->fd != found[i].fd)
				continue;
			require((found[i].events & ~(uint32_t) (EPOLLIN | EPOLLOUT)) == 0, "an event that cannot be");
			require(link->lane->filled == 0, "Python is to read what comes after bytes that the lane has");
			if (found[i].events & EPOLLIN && !link->paused)
				python_receives(link, run->buffer_bytes);
			if (found[i].events & EPOLLOUT)
				flush_queue(link);
		}
}
