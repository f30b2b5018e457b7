/*
 * The other ends of a proposer's lanes: Postgres, and the safekeepers.
 *
 * They check what they are sent: a safekeeper each append, which must follow the one before and have just Postgres's bytes;
 * Postgres each status; and neither may hear of more than a majority has acknowledged.
 */
#include <string.h>

#include "proposer.h"

bool
is_broken(Sent *sent)
{
	sent->broken = true;
	return false;
}

/* The size of the next message on this wire that is there in full; 0 when none is, or it cannot be one. */
static size_t
next_message(Sent *sent)
{
	const uint8_t *at = sent->wire.at + sent->parsed;
	size_t		count = sent->sent - sent->parsed;

	if (sent->broken || count == 0)
		return 0;
	if (at[0] != 'd' || (count >= 5 && number(at + 1, 4) < 5))
		return is_broken(sent);
	return whole_message(at, count);
}

/* What of Postgres's bytes is WAL that follows. */
static void
parse_xlog(Proposal *run)
{
	Sent	   *sent = &run->xlog;
	size_t		size;

	while ((size = next_message(sent)) != 0)
	{
		const uint8_t *at = sent->wire.at + sent->parsed;

		if (at[5] == 'w' && size > XLOG_HEAD && number(at + 6, 8) == run->model_end_lsn)
		{
			size_t		place = (size_t) (run->model_end_lsn - run->reference_lsn);

			run->reference.size = place;
			add(&run->reference, at + XLOG_HEAD, size - XLOG_HEAD);
			run->model_end_lsn += size - XLOG_HEAD;
		}
		else if (at[5] != 'k' || size != 23)
		{
			(void) is_broken(sent);
			return;
		}
		sent->parsed += size;
	}
}

bool
is_answer(const uint8_t *at, size_t size)
{
	return size == ANSWER_BYTES && at[5] == 'a' && number(at + 6, 4) == GENERATION && number(at + 10, 8) == TERM;
}

static void
parse_answers(Safekeeper *keeper)
{
	Sent	   *sent = &keeper->answers;
	size_t		size;

	while ((size = next_message(sent)) != 0)
	{
		if (sent->wire.at[sent->parsed + 5] != 'a' || size < ANSWER_BYTES || size > 4 * ANSWER_BYTES)
		{
			(void) is_broken(sent);
			return;
		}
		sent->parsed += size;
	}
}

/* All answers up to this place on the wire were taken, by lane or Python; what they say is known by now. */
void
answers_used(const Proposal *run, Safekeeper *keeper, size_t end)
{
	Sent	   *sent = &keeper->answers;

	require(end <= sent->parsed, "an answer is taken that is none");
	while (sent->used < end)
	{
		const uint8_t *at = sent->wire.at + sent->used;
		size_t		size = 1 + (size_t) number(at + 1, 4);

		/* an answer that tells of WAL that does not exist may be dropped, and counts for nothing */
		if (is_answer(at, size) && number(at + 18, 8) <= run->model_end_lsn)
			keeper->claimed_lsn = max_u64(keeper->claimed_lsn, number(at + 18, 8));
		sent->used += size;
	}
	require(sent->used == end, "an answer is taken in part");
}

static void
send_wire(Proposal *run, Sent *sent, int fd)
{
	size_t		left = sent->wire.size - sent->sent;

	if (left > 0)
	{
		size_t		went = send_some(fd, sent->wire.at + sent->sent, some(left));

		sent->sent += went;
		run->progress |= went > 0;
	}
}

/* A new connection: what was on its way is lost. */
void
lose_wire(Sent *sent, Link *link)
{
	Bytes		lost = {0};
	LaneLoop   *loop = link->lane->loop;

	detach_link(link);
	link->lane->due_ns = 0;
	require(lane_loop_attach(loop, link->lane) == 0, "a lane cannot be attached again");
	while (receive_some(link->fd, &lost, 65536) > 0)
		continue;
	release(&lost);
	link->lane->filled = link->lane->received = 0;
	link->held.size = 0;
	link->received = 0;
	release(&sent->wire);
	*sent = (Sent)
	{
		0
	};
}

static uint64_t
commit_bound(const Proposal *run)
{
	uint64_t	claimed[MOST_MEMBERS];

	for (uint32_t i = 0; i < run->proposer.members; i++)
		claimed[i] = run->safekeepers[i].claimed_lsn;
	return max_u64(sorted_quorum_lsn(&run->proposer, claimed), run->proposer.term_start_lsn);
}

/* - Postgres */

void
postgres_sends(Proposal *run)
{
	Sent	   *sent = &run->xlog;

	while (sent->wire.size - sent->sent < 2000 && run->next_lsn < run->end_lsn)
	{
		size_t		left = (size_t) (run->end_lsn - run->next_lsn);
		size_t		size = some(left < run->most_wal ? left : run->most_wal);
		size_t		head;

		if (one_in(60))
			add_fields(&sent->wire, 1, U('d'), 4, U(22), 1, U('k'), 8, run->next_lsn, 8, U(0), 1, U(1), 0);
		head = sent->wire.size;
		add_fields(&sent->wire, 1, U('d'), 4, U(XLOG_HEAD - 1 + size), 1, U('w'), 8, run->next_lsn, 8, run->next_lsn + size, 8,
				   U(0), 0);
		for (size_t i = 0; i < size; i += 4)
		{
			uint32_t	word = next_random();

			add(&sent->wire, &word, size - i < 4 ? size - i : 4);
		}
		if (run->mutates && one_in(30))
		{
			mutate(sent->wire.at + head, one_in(2) ? XLOG_HEAD : sent->wire.size - head);
			sent->mutated = true;
		}
		run->next_lsn += size;
	}
	send_wire(run, sent, run->postgres.peer);
	parse_xlog(run);
}

void
postgres_reads(Proposal *run)
{
	run->progress |= receive_some(run->postgres.peer, &run->statuses, 1 + below(300)) > 0;
	while (run->statuses.size >= STATUS_BYTES)
	{
		const uint8_t *at = run->statuses.at;
		uint64_t	commit_lsn = number(at + 6, 8);

		require(number(at, 6) == (U('d') << 40 | U(STATUS_BYTES - 1) << 8 | 'r') && at[38] == 0, "a status that was torn");
		require(number(at + 14, 8) == commit_lsn && number(at + 22, 8) <= commit_lsn, "a status that contradicts itself");
		require(commit_lsn >= run->told_lsn, "Postgres is told of less than before");
		require(commit_lsn <= commit_bound(run), "Postgres is told of more than a majority has");
		run->told_lsn = commit_lsn;
		drop(&run->statuses, STATUS_BYTES);
		seen.statuses++;
	}
}

/* - a safekeeper */

void
safekeeper_reads(Proposal *run, Safekeeper *keeper)
{
	size_t		size;

	run->progress |= receive_some(keeper->link.peer, &keeper->appends, some(200000)) > 0;
	while (keeper->appends.size > 0 && (size = whole_message(keeper->appends.at, keeper->appends.size)) != 0)
	{
		const uint8_t *at = keeper->appends.at;
		uint64_t	end_lsn = number(at + 26, 8);
		size_t		bytes = size - APPEND_FRAME;

		require(size >= APPEND_FRAME && bytes <= APPEND_MOST_BYTES && at[0] == 'd' && at[5] == 'a' &&
				number(at + 6, 4) == GENERATION && number(at + 10, 8) == TERM, "an append that is none");
		require(number(at + 18, 8) == keeper->received_lsn, "an append that leaves a gap or overlaps");
		require(end_lsn == keeper->received_lsn + bytes && end_lsn <= run->model_end_lsn, "an append of another length");
		require(memcmp(at + APPEND_FRAME, run->reference.at + (keeper->received_lsn - run->reference_lsn), bytes) == 0,
				"an append with other bytes than Postgres sent");
		require(number(at + 34, 8) <= commit_bound(run) && number(at + 42, 8) <= number(at + 34, 8),
				"an append that tells of more than is committed");
		keeper->received_lsn = end_lsn;
		keeper->asked = true;
		drop(&keeper->appends, size);
	}
	require(keeper->appends.size == 0 || keeper->appends.at[0] == 'd', "bytes that begin no append");
	require(keeper->appends.size < 5 || number(keeper->appends.at + 1, 4) < APPEND_FRAME + APPEND_MOST_BYTES,
			"an append that is too long");
}

void
safekeeper_answers(Proposal *run, Safekeeper *keeper)
{
	Sent	   *sent = &keeper->answers;

	if (keeper->asked && sent->wire.size - sent->sent < 500)
	{
		size_t		head = sent->wire.size;
		uint64_t	behind = keeper->received_lsn > keeper->flush_lsn ? keeper->received_lsn - keeper->flush_lsn : 0;
		bool		partly = behind > 0 && one_in(4);
		uint64_t	told_lsn;
		/* now and then one that is Python's: of another term, with news of a replica, or with more in it */
		uint32_t	other = one_in(50) ? 1 + below(3) : 0;

		keeper->flush_lsn += partly ? below(behind) : behind;
		told_lsn = keeper->flush_lsn - (one_in(20) ? below(100) : 0);
		keeper->asked = partly || other == 1 || other == 3 || told_lsn < keeper->flush_lsn;
		if (other == 2)
			keeper->standby[below(PROPOSER_STANDBY_BYTES)] ^= 1;
		add_fields(&sent->wire, 1, U('d'), 4, U(ANSWER_BYTES - 1 + (other == 3 ? 11 : 0)), 1, U('a'), 4, U(GENERATION), 8,
				   U(TERM - (other == 1)), 8, told_lsn, 8, told_lsn - below(500), 0);
		add(&sent->wire, keeper->standby, PROPOSER_STANDBY_BYTES);
		if (other == 3)
			add_fields(&sent->wire, 8, U(0), 3, U(0), 0);
		if (run->mutates && one_in(30))
		{
			mutate(sent->wire.at + head, sent->wire.size - head);
			sent->mutated = true;
			keeper->asked = true;
		}
	}
	send_wire(run, sent, keeper->link.peer);
	parse_answers(keeper);
}
