/*
 * A safekeeper's lane: it checks that just those appends are taken, written and answered that a plain model says, with
 * append_lane_take() alone in memory of just the bytes' size, and through a socket and the event loop.
 *
 * The proposer at the other end, and Python, which does what the lane leaves, are played here.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lane_fuzz.h"

#define MOST_BATCHED 512		/* appends that one call takes */

typedef struct AppendRun
{
	AppendLane	lane;
	const Wal  *wal;
	uint64_t	first_lsn;
	Bytes		image;			/* what was written, from first_lsn on */
	Bytes		stream;			/* what the proposer sends */
	bool		mutated;
	bool		ended;
	uint64_t	taken_bytes;	/* of WAL */

	/* the next call's, as the model says */
	size_t		expect_consumed;
	int			expect_appends;
	bool		expect_not_wal;
	uint64_t	expect_write_lsn;
	uint64_t	expect_flush_lsn;
	uint64_t	expect_commit_lsn;
	uint64_t	expect_truncate_lsn;
	int			fails_with;		/* the next write: an errno */
	int			written;		/* calls of the writer in this call */
} AppendRun;

static AppendRun *writing;

static int
write_image(int fd, const struct iovec *pieces, int count, int64_t offset, int flags)
{
	AppendRun  *run = writing;
	uint64_t	lsn = run->lane.segment_lsn + (uint64_t) offset;

	require(fd == run->lane.file && flags == run->lane.flags, "a write to another file, or with other flags");
	require(count == run->expect_appends, "a write of more or fewer appends than may be taken");
	require(lsn == run->first_lsn + run->image.size, "a write at another position than the end of the log");
	run->written++;
	if (run->fails_with != 0)
		return run->fails_with;
	for (int i = 0; i < count; i++)
		add(&run->image, pieces[i].iov_base, pieces[i].iov_len);
	require(run->first_lsn + run->image.size <= run->lane.plain_end, "a write beyond plain_end");
	return 0;
}

/* Whether a whole message is an append of our leader that the log can take next. */
static bool
is_next_append(const uint8_t *message, size_t size, uint64_t end_lsn)
{
	return size > APPEND_FRAME && message[0] == 'd' && message[5] == 'a' &&
		number(message + 6, 4) == GENERATION && number(message + 10, 8) == TERM && number(message + 18, 8) == end_lsn &&
		number(message + 26, 8) - end_lsn == size - APPEND_FRAME;
}

/* What append_lane_take() must do with these bytes. */
static void
expect(AppendRun *run, const uint8_t *bytes, size_t count)
{
	const AppendLane *lane = &run->lane;
	WalStream	scanner = *lane->scanner;
	uint64_t	end_lsn = lane->write_lsn;
	size_t		at = 0;
	size_t		size;

	run->expect_appends = 0;
	run->expect_not_wal = false;
	run->expect_commit_lsn = lane->commit_lsn;
	run->expect_truncate_lsn = lane->truncate_lsn;
	while (lane->error == 0 && lane->writes < APPEND_WRITES && run->expect_appends < MOST_BATCHED &&
		   (size = whole_message(bytes + at, count - at)) != 0 && is_next_append(bytes + at, size, end_lsn) &&
		   size <= APPEND_FRAME + APPEND_MOST_BYTES && end_lsn + (size - APPEND_FRAME) <= lane->plain_end)
	{
		if (walscan_feed(&scanner, bytes + at + APPEND_FRAME, size - APPEND_FRAME) != 0)
		{
			run->expect_not_wal = true;
			break;
		}
		run->expect_appends++;
		run->expect_commit_lsn = max_u64(run->expect_commit_lsn, number(bytes + at + 34, 8));
		run->expect_truncate_lsn = max_u64(run->expect_truncate_lsn, number(bytes + at + 42, 8));
		end_lsn += size - APPEND_FRAME;
		at += size;
	}
	run->expect_write_lsn = end_lsn;
	run->expect_flush_lsn = scanner.record_end_lsn;
	run->expect_consumed = at;
	run->fails_with = lane->writer != NULL && one_in(run->mutated ? 30 : 400) ? (one_in(2) ? EIO : ENOSPC) : 0;
	run->written = 0;
}

/* Whether these differ at most in their flush_lsn. */
static bool
is_same_answer(const uint8_t *one, const uint8_t *other)
{
	return memcmp(one, other, 18) == 0 && memcmp(one + 26, other + 26, APPEND_ANSWER - 26) == 0;
}

/* Whether append_lane_take() did as expected with these bytes; `before` is the lane as it was. */
static void
check_taken(AppendRun *run, const AppendLane *before, const uint8_t *bytes, size_t consumed)
{
	const AppendLane *lane = &run->lane;
	bool		fails = run->expect_not_wal || (run->expect_appends > 0 && run->fails_with != 0);

	require(consumed == (fails ? 0 : run->expect_consumed), "another number of bytes is taken than may be");
	if (fails || consumed == 0)
	{
		require(lane->write_lsn == before->write_lsn && lane->flush_lsn == before->flush_lsn &&
				lane->commit_lsn == before->commit_lsn && lane->truncate_lsn == before->truncate_lsn &&
				lane->appends == before->appends && lane->writes == before->writes &&
				memcmp(lane->answer, before->answer, APPEND_ANSWER) == 0, "nothing was taken, and yet something changed");
		if (fails)
		{
			require(lane->error == (run->expect_not_wal ? APPEND_NOT_WAL : run->fails_with), "another error than the one met");
			require(lane->plain_end == 0 && lane->lane.wants, "a lane goes on after an error");
			require(run->written == !run->expect_not_wal, "a write of what is not WAL");
			seen.failed_writes += !run->expect_not_wal;
			seen.not_wal += run->expect_not_wal;
		}
		else
			require(lane->error == before->error && run->written == 0, "a write or an error for nothing");
		return;
	}
	require(lane->error == 0 && lane->write_lsn == run->expect_write_lsn && lane->flush_lsn == run->expect_flush_lsn &&
			lane->commit_lsn == run->expect_commit_lsn && lane->truncate_lsn == run->expect_truncate_lsn &&
			lane->appends == before->appends + (uint64_t) run->expect_appends, "another state than the appends say");
	require(lane->flush_lsn <= lane->write_lsn && lane->write_lsn <= lane->plain_end, "positions out of order");
	require(lane->writes == before->writes + 1 && lane->sizes[before->writes] == lane->write_lsn - before->write_lsn,
			"another write than was told");
	require(number(lane->answer + 18, 8) == max_u64(lane->flush_lsn, lane->timeline_start_lsn),
			"an answer with another flush_lsn");
	require(is_same_answer(lane->answer, before->answer), "an answer that differs in more than its flush_lsn");
	if (lane->writer == NULL)
	{
		size_t		count = (size_t) (lane->write_lsn - before->write_lsn);
		uint8_t    *image = grow(&run->image, count);

		require(pread(lane->file, image, count, (off_t) (before->write_lsn - lane->segment_lsn)) == (ssize_t) count,
				"the file ends before the log");
	}
	for (uint64_t lsn = before->write_lsn; lsn < lane->write_lsn;)
	{
		size_t		size = 1 + (size_t) number(bytes + 1, 4) - APPEND_FRAME;

		require(memcmp(run->image.at + (lsn - run->first_lsn), bytes + APPEND_FRAME, size) == 0,
				"other bytes written than the appends have");
		lsn += size;
		bytes += APPEND_FRAME + size;
	}
	require(run->written == (lane->writer != NULL), "an answer without a write");
	require(run->first_lsn + run->image.size == lane->write_lsn, "more or less written than was taken");
	run->taken_bytes += lane->write_lsn - before->write_lsn;
	seen.appends += (unsigned long) run->expect_appends;
}

/* The open segment is the one at write_lsn; not always all of it needs but a write. */
static void
open_segment(AppendRun *run)
{
	AppendLane *lane = &run->lane;
	uint64_t	segment = run->wal->segment_size;

	lane->segment_lsn = lane->write_lsn / segment * segment;
	lane->plain_end = lane->segment_lsn + segment;
	if (one_in(4))
		lane->plain_end = min_u64(lane->plain_end, lane->write_lsn + some(100000));
	else if (one_in(8))
		lane->plain_end = 0;
}

static void
begin_appends(AppendRun *run, const Wal *wal)
{
	AppendLane *lane = &run->lane;
	size_t		most = one_in(3) ? 200 : 2 * APPEND_MOST_BYTES;
	uint64_t	lsn;

	*run = (AppendRun)
	{
		.wal = wal, .first_lsn = wal->start_lsn, .mutated = one_in(2)
	};
	writing = run;
	lane->scanner = walscan_new(wal->start_lsn, wal->segment_size);
	require(lane->scanner != NULL, "out of memory");
	lane->writer = write_image;
	lane->file = 1000 + (int) below(1000);
	lane->flags = (int) below(100);
	lane->generation = GENERATION;
	lane->term = TERM;
	lane->write_lsn = lane->flush_lsn = wal->start_lsn;
	lane->timeline_start_lsn = one_in(2) ? wal->start_lsn : wal->start_lsn + below(100000);
	lane->tell_ns = one_in(2) ? 0 : below(3000000);
	for (int i = 0; i < APPEND_ANSWER; i++)
		lane->answer[i] = (uint8_t) next_random();
	open_segment(run);

	for (lsn = wal->start_lsn; lsn < wal->start_lsn + wal->size;)
	{
		size_t		left = (size_t) (wal->start_lsn + wal->size - lsn);
		size_t		size = some(left < most ? left : most);
		size_t		head = run->stream.size;
		/* now and then one that is not this leader's, or that has no WAL */
		uint32_t	other = one_in(100) ? 1 + below(3) : 0;

		if (other == 3)
			size = 0;
		add_fields(&run->stream, 1, U('d'), 4, U(APPEND_FRAME - 1 + size), 1, U('a'), 4, U(GENERATION + (other == 1)), 8,
				   U(TERM - (other == 2)), 8, U(lsn), 8, U(lsn + size), 8, U(lsn - below(3000)), 8, U(lsn - below(9000)), 0);
		add(&run->stream, wal->bytes + (lsn - wal->start_lsn), size);
		if (run->mutated && one_in(30))
			mutate(run->stream.at + head, run->stream.size - head);
		if (other == 0)
			lsn += size;
		if (run->stream.size > 40 * APPEND_FRAME && one_in(3000))
			break;
	}
}

static void
end_appends(AppendRun *run)
{
	/* a write may fail in any run: then the log ends before its end, and nothing else is known */
	if (!run->mutated && !run->ended)
	{
		size_t		all = 0;
		uint64_t	end_lsn = run->first_lsn;

		for (size_t at = 0; at < run->stream.size; at += 1 + (size_t) number(run->stream.at + at + 1, 4))
		{
			size_t		size = 1 + (size_t) number(run->stream.at + at + 1, 4);

			if (is_next_append(run->stream.at + at, size, end_lsn))
			{
				end_lsn += size - APPEND_FRAME;
				all += size - APPEND_FRAME;
			}
		}
		require(run->image.size == all, "not all of the WAL was written");
		require(memcmp(run->image.at, run->wal->bytes, all) == 0, "other WAL was written than was sent");
	}
	walscan_free(run->lane.scanner);
	release(&run->image);
	release(&run->stream);
	writing = NULL;
}

/* What Python does with the message at the beginning, of which the lane took nothing; its size, 0 when it needs more bytes. */
static size_t
append_the_long_way(AppendRun *run, const uint8_t *bytes, size_t count)
{
	AppendLane *lane = &run->lane;
	size_t		size = whole_message(bytes, count);

	if (size == 0)
	{
		/* no message is that large, or so small */
		if (count >= 5 && (number(bytes + 1, 4) > APPEND_FRAME + 2 * APPEND_MOST_BYTES || number(bytes + 1, 4) < 5))
			run->ended = true;
		return 0;
	}
	if (is_next_append(bytes, size, lane->write_lsn))
	{
		if (walscan_feed(lane->scanner, bytes + APPEND_FRAME, size - APPEND_FRAME) != 0)
		{
			require(run->mutated, "valid WAL is refused");
			run->ended = true;
			return 0;
		}
		add(&run->image, bytes + APPEND_FRAME, size - APPEND_FRAME);
		lane->write_lsn += size - APPEND_FRAME;
		lane->flush_lsn = lane->scanner->record_end_lsn;
		open_segment(run);
	}
	return size;
}

/* In memory of just its size, cut anyhow. */
void
fuzz_take(const Wal *wal)
{
	static AppendRun run;
	size_t		from = 0,
				to = 0;

	begin_appends(&run, wal);
	while (!run.ended && (to < run.stream.size || to > from))
	{
		AppendLane	before;
		size_t		count,
					consumed;
		uint8_t    *exact;

		if (to < run.stream.size)
			to += some(run.stream.size - to);
		count = to - from;
		exact = allocate(count);
		memcpy(exact, run.stream.at + from, count);
		expect(&run, exact, count);
		before = run.lane;
		consumed = append_lane_take(&run.lane, exact, count);
		check_taken(&run, &before, exact, consumed);
		if (consumed == 0 && run.lane.error == 0 && run.lane.writes < APPEND_WRITES)
		{
			consumed = append_the_long_way(&run, exact, count);
			if (consumed == 0 && to == run.stream.size)
				run.ended = run.ended || run.mutated;
		}
		free(exact);
		from += consumed;
		if (run.lane.error != 0)
		{
			require(append_lane_take(&run.lane, run.stream.at + from, run.stream.size - from) == 0,
					"something is taken after an error");
			run.ended = true;
		}
		if (run.lane.writes == APPEND_WRITES || one_in(3))
		{
			run.lane.writes = 0;
			run.lane.appends = 0;
		}
	}
	end_appends(&run);
}

/* What the proposer hears: whole answers, each at least as far as the one before. */
static void
read_answers(const AppendRun *run, int fd, Bytes *answers, uint64_t *answered)
{
	(void) receive_some(fd, answers, 1 + below(3000));
	while (answers->size >= APPEND_ANSWER)
	{
		uint64_t	flush_lsn = number(answers->at + 18, 8);

		require(is_same_answer(answers->at, run->lane.answer), "an answer that was torn");
		require(flush_lsn >= *answered && flush_lsn <= max_u64(run->lane.flush_lsn, run->lane.timeline_start_lsn),
				"an answer that goes back, or tells of what is not durable");
		*answered = flush_lsn;
		drop(answers, APPEND_ANSWER);
	}
}

static void
settle_appends(AppendRun *run, Link *link, LaneLoop *loop)
{
	Lane	   *touched[2];
	AppendLane *lane = &run->lane;
	int			count = touched_lanes(loop, touched, 2);

	if (count == 0)
		return;
	if (lane->appends > 0)
	{
		require(lane->writes > 0, "appends without a write");
		lane->appends = lane->writes = 0;
		seen.answers_unsent += lane->unsent > 0;
		python_write(link, lane->answer + APPEND_ANSWER - lane->unsent, lane->unsent);
		lane->unsent = 0;
	}
	lane->lane.wants = 0;
	count_and_hand_over(link);
	run->ended = run->ended || lane->error != 0;
}

/* Through a socket and the event loop. */
void
fuzz_append_lane(const Wal *wal)
{
	static const size_t buffers[] = {200, 5000, 70000, 140000, 300000};
	static AppendRun run;
	int			epoll_fd = epoll_create1(0);
	LaneLoop   *loop = lane_loop_new(epoll_fd);
	Link		link;
	Bytes		answers = {0};
	uint64_t	answered = 0;
	size_t		sent = 0;
	int			idle = 0;
	uint64_t	durable_answer = 0;
	bool		reads_slowly = one_in(2);

	require(epoll_fd >= 0 && loop != NULL, "no event loop");
	begin_appends(&run, wal);
	link_count = 0;
	open_link(&link, loop, epoll_fd, &run.lane.lane, append_lane_readable, append_lane_due, buffers[below(5)]);
	if (one_in(3))
	{
		run.lane.writer = NULL;
		run.lane.early_bytes = one_in(2) ? 0 : 1 + some(5000);
		run.lane.file = memfd_create("segment", 0);
		require(run.lane.file >= 0, "no file");
	}
	while (!run.ended && idle < 100)
	{
		LaneEvent	found[4];
		AppendLane	before;
		Lane	   *base = &run.lane.lane;
		size_t		left = run.stream.size - sent,
					filled = base->filled,
					count;
		uint8_t    *view;
		ssize_t		comes;
		int			events;
		bool		runs;
		uint64_t	image_bytes = run.image.size;

		if (left > 0)
			sent += send_some(link.peer, run.stream.at + sent, some(left));
		if (!reads_slowly || left == 0 || one_in(20))
			read_answers(&run, link.peer, &answers, &answered);

		/* lend */
		run.lane.lane.open = link.held.size == 0 && run.lane.plain_end > run.lane.write_lsn;

		/* the model needs to see what the lane will */
		view = allocate(base->size);
		memcpy(view, base->buffer, filled);
		comes = recv(link.fd, view + filled, base->size - filled, MSG_DONTWAIT | MSG_PEEK);
		count = filled + (comes > 0 ? (size_t) comes : 0);
		runs = base->open && comes > 0 && link.queue.size == 0;
		if (runs)
			expect(&run, view, count);
		before = run.lane;
		events = lane_loop_wait(loop, 0, found, 4);
		require(events >= 0 && events <= 1, "events of nothing");
		if (runs)
		{
			size_t		consumed = run.lane.lane.filled <= count ? count - run.lane.lane.filled : 0;

			check_taken(&run, &before, view, consumed);
			if (consumed > 0)
				durable_answer = number(run.lane.answer + 18, 8);
			require(memcmp(base->buffer, view + consumed, base->filled) == 0, "bytes that were not taken are damaged");
		}
		free(view);
		settle_appends(&run, &link, loop);
		if (events > 0 && base->filled == 0 && found[0].events & EPOLLIN)
			python_receives(&link, 5000);
		if (link.queue.size > 0)
			flush_queue(&link);
		while (link.held.size > 0 && !run.ended)
		{
			size_t		used = append_the_long_way(&run, link.held.at, link.held.size);

			if (used == 0)
				break;
			drop(&link.held, used);
		}
		if (link.held.size == 0 && run.lane.plain_end <= run.lane.write_lsn && run.lane.error == 0)
			open_segment(&run);
		idle = image_bytes == run.image.size && sent == run.stream.size ? idle + 1 : 0;
	}
	if (!run.ended && !run.mutated)
	{
		require(link.queue.size == 0 && answers.size == 0, "an answer that was never sent in full");
		require(answered == durable_answer, "the last answer was not sent");
	}
	if (run.lane.writer == NULL)
		(void) close(run.lane.file);
	close_link(&link);
	lane_loop_free(loop);
	(void) close(epoll_fd);
	release(&answers);
	end_appends(&run);
}
