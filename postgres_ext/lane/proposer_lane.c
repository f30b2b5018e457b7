/*
 * WAL from Postgres into the ring and on to the safekeepers; acknowledgements to commit_lsn and on to Postgres.
 *
 * Invariant: Postgres is told a position only when a quorum of every set of voters has acknowledged it in this term.  To a
 * member goes, in order and without a gap, what its sent_lsn says; the lane sends to it only while nothing that Python queued
 * for it is waiting.  The ring never comes round to what is not committed: Python keeps the room (`room_bytes`).
 *
 * This is what PostgresLink, WalProposer.on_wal, pump and acknowledged, SafekeeperLink and Proposer.append_response do, in that
 * order; Python computes commit_lsn again from the acknowledgements, and must come to the same.
 */
#include <string.h>
#include <time.h>

#include "proposer_lane.h"

#define XLOG_FRAME 30			/* CopyData with XLogData: 'd', length, 'w', start, end, time */
#define XLOG_START 6
#define XLOG_MOST (1 << 20)		/* a longer message is Python's */
#define ANSWER_WEIGHT 16
#define BURST_BYTES (1024 * 1024)	/* that go to one member at once: the others wait meanwhile */

_Static_assert(ANSWER_STANDBY + PROPOSER_STANDBY_BYTES == APPEND_ANSWER, "the layout of a framed AppendResponse");

/* --- what is committed ------------------------------------------------------------------------------------------------- */

/* The highest position that more than half of this set has flushed; members that are not connected count with what they had. */
static uint64_t
set_lsn(const ProposerLane *proposer, unsigned int set)
{
	uint32_t	needed = proposer->voters[set] / 2 + 1;
	uint64_t	best = 0;

	for (uint32_t i = 0; i < proposer->members; i++)
	{
		uint64_t	lsn = proposer->member[i]->flush_lsn;
		uint32_t	have = 0;

		if ((proposer->member[i]->voter >> set & 1) == 0 || lsn <= best)
			continue;
		for (uint32_t k = 0; k < proposer->members; k++)
			have += (proposer->member[k]->voter >> set & 1) && proposer->member[k]->flush_lsn >= lsn;
		if (have >= needed)
			best = lsn;
	}
	return best;
}

/* As membership.quorum_lsn(): 0 while a set has no quorum in this term. */
uint64_t
proposer_lane_quorum_lsn(const ProposerLane *proposer)
{
	uint64_t	lsn;

	if (proposer->voters[0] == 0)
		return 0;
	lsn = set_lsn(proposer, 0);
	if (lsn < proposer->term_start_lsn)
		return 0;
	if (proposer->voters[1] != 0)
	{
		uint64_t	second = set_lsn(proposer, 1);

		if (second < proposer->term_start_lsn)
			return 0;
		if (second < lsn)
			lsn = second;
	}
	return lsn;
}

/* What every voter has flushed; 0 when one is not of our list. */
static uint64_t
everywhere_lsn(const ProposerLane *proposer)
{
	uint64_t	lowest = UINT64_MAX;

	for (unsigned int set = 0; set < 2; set++)
	{
		uint32_t	seen = 0;

		for (uint32_t i = 0; i < proposer->members; i++)
		{
			if ((proposer->member[i]->voter >> set & 1) == 0)
				continue;
			seen++;
			if (proposer->member[i]->flush_lsn < lowest)
				lowest = proposer->member[i]->flush_lsn;
		}
		if (seen < proposer->voters[set])
			return 0;
	}
	return lowest;
}

static bool
advance(ProposerLane *proposer)
{
	uint64_t	commit_lsn = proposer_lane_quorum_lsn(proposer),
				truncate_lsn = everywhere_lsn(proposer);
	bool		moved = commit_lsn > proposer->commit_lsn;

	if (moved)
		proposer->commit_lsn = commit_lsn;
	if (truncate_lsn > proposer->commit_lsn)
		truncate_lsn = proposer->commit_lsn;
	if (truncate_lsn > proposer->truncate_lsn)
		proposer->truncate_lsn = truncate_lsn;
	return moved;
}

/* --- what is due, and when --------------------------------------------------------------------------------------------- */

static void
set_due(ProposerLane *proposer)
{
	int64_t		due_ns = proposer->lazy_due_ns;

	due_ns = lane_earlier(due_ns, proposer->broadcast_due_ns);
	proposer->lane.due_ns = lane_earlier(due_ns, proposer->gather_due_ns);
	lane_touch(&proposer->lane);
}

/* What Python had timers for is the lanes' to do, at these times (0: there was none). */
void
proposer_lane_arm(ProposerLane *proposer, int64_t lazy_due_ns, int64_t broadcast_due_ns)
{
	proposer->lazy_due_ns = lane_earlier(proposer->lazy_due_ns, lazy_due_ns);
	proposer->broadcast_due_ns = lane_earlier(proposer->broadcast_due_ns, broadcast_due_ns);
	set_due(proposer);
}

static void
want(ProposerLane *proposer)
{
	proposer->lane.wants = 1;
	lane_touch(&proposer->lane);
}

/* --- gathering -------------------------------------------------------------------------------------------------------- */

/*
 * WAL that came while an append was under way waits a little for more, so that its flush serves more commits.  Only when
 * processors are short: then each append costs time that backends lack, and most of what commits wait for is a processor; on
 * an idle machine the next append would go at once and waiting would be just that.
 */
static void
gather(ProposerMember *member, int64_t now_ns)
{
	ProposerLane *proposer = member->proposer;
	int64_t		due_ns = member->sent_at_ns + proposer->gather_ns;

	if (proposer->gather_ns == 0 || proposer->gather_due_ns != 0 || member->slot == proposer->lazy || due_ns <= now_ns ||
		member->sent_lsn == proposer->ring_end || !processors_are_short(&proposer->processors, now_ns))
		return;
	proposer->gather_due_ns = due_ns;
	set_due(proposer);
}

/* --- to a safekeeper ---------------------------------------------------------------------------------------------------- */

static void
send_append(ProposerMember *member, uint64_t end_lsn, int64_t now_ns)
{
	ProposerLane *proposer = member->proposer;
	uint8_t		head[APPEND_FRAME];
	uint64_t	begin_lsn = member->sent_lsn;
	size_t		size = end_lsn - begin_lsn,
				at = begin_lsn % proposer->ring_size,
				first = proposer->ring_size - at < size ? proposer->ring_size - at : size,
				sent;

	head[0] = COPY_DATA;
	lane_put_u32(head + AT_LENGTH, (uint32_t) (APPEND_FRAME - 1 + size));
	head[AT_KIND] = APPEND;
	lane_put_u32(head + AT_GENERATION, proposer->generation);
	lane_put_u64(head + AT_TERM, proposer->term);
	lane_put_u64(head + AT_BEGIN, begin_lsn);
	lane_put_u64(head + AT_END, end_lsn);
	lane_put_u64(head + AT_COMMIT, proposer->commit_lsn);
	lane_put_u64(head + AT_TRUNCATE, proposer->truncate_lsn);
	member->sent_lsn = end_lsn;
	member->told_commit_lsn = proposer->commit_lsn;
	member->last_sent_ns = now_ns;
	if (!member->awaiting)
	{
		member->awaiting = 1;
		member->sent_at_ns = now_ns;
	}
	lane_touch(&member->lane);
	sent = lane_send(&member->lane, head, sizeof(head), proposer->ring + at, first, proposer->ring, size - first);
	if (sent < sizeof(head) + size)
	{
		/* the ring may come round before Python has sent the rest */
		memcpy(member->message, head, sizeof(head));
		memcpy(member->message + sizeof(head), proposer->ring + at, first);
		memcpy(member->message + sizeof(head) + first, proposer->ring, size - first);
		member->message_bytes = (uint32_t) (sizeof(head) + size);
		member->unsent = (uint32_t) (member->message_bytes - sent);
		member->mode = MEMBER_PYTHON;
		want(proposer);
	}
}

/* As WalProposer.pump(): send what is due. */
static void
pump(ProposerLane *proposer, uint32_t slot, bool now, int64_t now_ns)
{
	ProposerMember *member = proposer->member[slot];
	uint64_t	pending,
				burst_end = member->sent_lsn + BURST_BYTES;

	while ((pending = proposer->ring_end - member->sent_lsn) > 0 && member->mode != MEMBER_CLOSED)
	{
		if (!now)
		{
			if (slot == proposer->lazy)
			{
				if (pending < proposer->lazy_bytes)
				{
					if (proposer->lazy_due_ns == 0)
					{
						proposer->lazy_due_ns = now_ns + proposer->lazy_ns;
						set_due(proposer);
					}
					return;
				}
			}
			else if ((member->awaiting || proposer->gather_due_ns != 0) && pending < APPEND_MOST_BYTES)
				return;
		}
		if (member->mode != MEMBER_DIRECT || !lane_sends_directly(&member->lane) || member->sent_lsn < proposer->ring_start ||
			pending > proposer->ring_size || member->sent_lsn >= burst_end)
		{
			proposer->pump |= UINT32_C(1) << slot;
			want(proposer);
			return;
		}
		send_append(member, member->sent_lsn + (pending < APPEND_MOST_BYTES ? pending : APPEND_MOST_BYTES), now_ns);
	}
}

/* --- from and to Postgres ----------------------------------------------------------------------------------------------- */

static void
send_status(ProposerLane *proposer)
{
	uint8_t    *status = proposer->status;
	struct timespec now;
	uint64_t	applied_lsn = proposer->applied_lsn < proposer->commit_lsn ? proposer->applied_lsn : proposer->commit_lsn;

	lane_touch(&proposer->lane);
	if (proposer->unsent || !lane_sends_directly(&proposer->lane))
	{
		proposer->status_due = 1;
		want(proposer);
		return;
	}
	clock_gettime(CLOCK_REALTIME, &now);
	status[0] = COPY_DATA;
	lane_put_u32(status + 1, PROPOSER_STATUS_BYTES - 1);
	status[5] = 'r';
	lane_put_u64(status + 6, proposer->commit_lsn);
	lane_put_u64(status + 14, proposer->commit_lsn);
	lane_put_u64(status + 22, applied_lsn);
	lane_put_u64(status + 30, (uint64_t) (now.tv_sec * 1000000 + now.tv_nsec / 1000 - proposer->postgres_epoch_us));
	status[38] = 0;
	proposer->statuses++;
	proposer->unsent = (uint32_t) (PROPOSER_STATUS_BYTES - lane_send(&proposer->lane, status, PROPOSER_STATUS_BYTES, NULL, 0,
																	 NULL, 0));
	if (proposer->unsent)
		want(proposer);
}

static void
append_to_ring(ProposerLane *proposer, const uint8_t *data, size_t size)
{
	size_t		at = proposer->ring_end % proposer->ring_size,
				first = proposer->ring_size - at < size ? proposer->ring_size - at : size;

	memcpy(proposer->ring + at, data, first);
	memcpy(proposer->ring, data + first, size - first);
	proposer->ring_end += size;
	if (proposer->ring_end > proposer->ring_size && proposer->ring_start < proposer->ring_end - proposer->ring_size)
		proposer->ring_start = proposer->ring_end - proposer->ring_size;
}

/* Take the XLogData messages at the beginning of these bytes into the ring, and send them on; how many bytes they were. */
size_t
proposer_lane_take_wal(ProposerLane *proposer, const uint8_t *bytes, size_t count)
{
	size_t		at = 0;
	int64_t		now_ns;

	while (count - at > XLOG_FRAME)
	{
		const uint8_t *message = bytes + at;
		size_t		length = 1 + (size_t) lane_u32(message + 1);

		if (message[0] != COPY_DATA || message[FRAME_HEAD] != 'w' || length <= XLOG_FRAME || length > XLOG_MOST ||
			count - at < length || lane_u64(message + XLOG_START) != proposer->ring_end ||
			proposer->ring_end - proposer->commit_lsn + length > proposer->room_bytes)
			break;
		append_to_ring(proposer, message + XLOG_FRAME, length - XLOG_FRAME);
		at += length;
	}
	if (at > 0)
	{
		now_ns = lane_now_ns();
		lane_touch(&proposer->lane);
		for (uint32_t slot = 0; slot < proposer->members; slot++)
			pump(proposer, slot, false, now_ns);
	}
	return at;
}

static bool
is_part_of_wal(const uint8_t *bytes, size_t count)
{
	if (!may_be_copy_data(bytes, count, 'w'))
		return false;
	if (count >= FRAME_HEAD)
	{
		size_t		length = 1 + (size_t) lane_u32(bytes + 1);

		return length > XLOG_FRAME && length <= XLOG_MOST && count < length;
	}
	return true;
}

LaneResult
proposer_lane_postgres_readable(Lane *lane)
{
	ProposerLane *proposer = (ProposerLane *) lane;

	if (!lane_receive(lane))
		return LANE_LEAVES;
	lane_drop(lane, proposer_lane_take_wal(proposer, lane->buffer, lane->filled));
	return is_part_of_wal(lane->buffer, lane->filled) ? LANE_TOOK : LANE_LEAVES;
}

/* --- from a safekeeper -------------------------------------------------------------------------------------------------- */

/* As Proposer.append_response() and WalProposer.acknowledged(). */
static void
acknowledged(ProposerMember *member, uint64_t flush_lsn, uint64_t commit_lsn)
{
	ProposerLane *proposer = member->proposer;
	int64_t		now_ns;
	bool		moved = false;

	member->heard = 1;
	member->persisted_commit_lsn = commit_lsn;
	lane_touch(&member->lane);
	if (flush_lsn > member->flush_lsn)
	{
		member->flush_lsn = flush_lsn;
		if (member->voter != 0)
			moved = advance(proposer);
	}
	if (moved)
		send_status(proposer);	/* first of all: commits wait for it */
	now_ns = lane_now_ns();
	if (member->awaiting)
	{
		member->awaiting = 0;
		member->answer_s += ((double) (now_ns - member->sent_at_ns) / 1e9 - member->answer_s) / ANSWER_WEIGHT;
	}
	if (moved)
	{
		proposer->commit_moved_ns = now_ns;
		if (proposer->broadcast_due_ns == 0)
		{
			proposer->broadcast_due_ns = now_ns + proposer->broadcast_ns;
			set_due(proposer);
		}
		if (proposer->paused)
			want(proposer);
	}
	gather(member, now_ns);
	pump(proposer, member->slot, false, now_ns);
}

/* Take the acknowledgements at the beginning of these bytes; how many bytes they were. */
size_t
proposer_lane_take_answers(ProposerMember *member, const uint8_t *bytes, size_t count)
{
	const ProposerLane *proposer = member->proposer;
	size_t		at = 0;

	while (count - at >= APPEND_ANSWER && member->active)
	{
		const uint8_t *answer = bytes + at;

		if (answer[0] != COPY_DATA || lane_u32(answer + AT_LENGTH) != APPEND_ANSWER - 1 || answer[AT_KIND] != APPEND ||
			lane_u32(answer + AT_GENERATION) != proposer->generation || lane_u64(answer + AT_TERM) != proposer->term ||
			lane_u64(answer + ANSWER_FLUSH) > member->sent_lsn ||
			memcmp(answer + ANSWER_STANDBY, member->standby, PROPOSER_STANDBY_BYTES) != 0)
			break;
		acknowledged(member, lane_u64(answer + ANSWER_FLUSH), lane_u64(answer + ANSWER_COMMIT));
		at += APPEND_ANSWER;
	}
	return at;
}

static bool
is_part_of_answer(const uint8_t *bytes, size_t count)
{
	if (!may_be_copy_data(bytes, count, APPEND))
		return false;
	if (count >= FRAME_HEAD && lane_u32(bytes + AT_LENGTH) != APPEND_ANSWER - 1)
		return false;
	return count < APPEND_ANSWER;
}

LaneResult
proposer_lane_member_readable(Lane *lane)
{
	ProposerMember *member = (ProposerMember *) lane;

	if (!lane_receive(lane))
		return LANE_LEAVES;
	lane_drop(lane, proposer_lane_take_answers(member, lane->buffer, lane->filled));
	return is_part_of_answer(lane->buffer, lane->filled) ? LANE_TOOK : LANE_LEAVES;
}

/* Enough was gathered, the lazy member's turn has come, or commits have paused and not all members know how far they came. */
void
proposer_lane_due(Lane *lane, int64_t now_ns)
{
	ProposerLane *proposer = (ProposerLane *) lane;

	if (proposer->gather_due_ns != 0 && proposer->gather_due_ns <= now_ns)
	{
		proposer->gather_due_ns = 0;
		for (uint32_t slot = 0; slot < proposer->members; slot++)
			pump(proposer, slot, false, now_ns);
	}
	if (proposer->lazy_due_ns != 0 && proposer->lazy_due_ns <= now_ns)
	{
		proposer->lazy_due_ns = 0;
		if (proposer->lazy < proposer->members)
			pump(proposer, proposer->lazy, true, now_ns);
	}
	if (proposer->broadcast_due_ns != 0 && proposer->broadcast_due_ns <= now_ns)
	{
		proposer->broadcast_due_ns = 0;
		if (now_ns - proposer->commit_moved_ns < proposer->broadcast_ns)
			proposer->broadcast_due_ns = proposer->commit_moved_ns + proposer->broadcast_ns;
		else
		{
			proposer->broadcast_due = 1;
			want(proposer);
		}
	}
	set_due(proposer);
}
