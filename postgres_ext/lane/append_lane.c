/*
 * Appends from the socket to the disk, and their answer.
 *
 * Invariant: an append is taken only when it is of the lane's term and generation, begins where the log ends, is valid WAL and
 * lies in the part of the open segment where one durable write is all there is to do.  The answer says what that write made
 * durable: the end of the last complete record.  After a failure nothing is taken before Python has looked.
 *
 * This is what Acceptor.append_request, WalStore.write and flush, and Acceptor.flush_batch do to the same bytes, in that order.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "append_lane.h"
#include "waldec.h"

#define MOST_PIECES 512

static int
write_all(int fd, const struct iovec *pieces, int count, int64_t offset, int flags)
{
	struct iovec left[MOST_PIECES];
	struct iovec *piece = left;

	memcpy(left, pieces, (size_t) count * sizeof(struct iovec));
	for (;;)
	{
		ssize_t		written = pwritev2(fd, piece, count, (off_t) offset, flags);

		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0)
			return errno;
		if (written == 0)
			return EIO;
		offset += written;
		while (count > 0 && (size_t) written >= piece->iov_len)
		{
			written -= (ssize_t) piece->iov_len;
			piece++;
			count--;
		}
		if (count == 0)
			return 0;
		piece->iov_base = (uint8_t *) piece->iov_base + written;
		piece->iov_len -= (size_t) written;
	}
}

/* Give the file what was checked so far, and let the device begin with it; 0, or an errno. */
static int
write_early(const AppendLane *lane, const struct iovec *pieces, int count, uint64_t lsn, uint64_t end_lsn)
{
	int64_t		offset = (int64_t) (lsn - lane->segment_lsn);
	int			error = write_all(lane->file, pieces, count, offset, 0);

	/* only a hint: where it is not to be had, the sync at the end does all */
	if (error == 0)
		(void) sync_file_range(lane->file, offset, (off64_t) (end_lsn - lsn), SYNC_FILE_RANGE_WRITE);
	return error;
}

/* Write the rest, and make it durable, with all that was written early; 0, or an errno. */
static int
finish(const AppendLane *lane, const struct iovec *pieces, int count, uint64_t lsn, bool early)
{
	/* a durable write covers only its own bytes */
	int			flags = early ? 0 : lane->flags;
	int			error = 0;

	if (count > 0)
		error = (lane->writer ? lane->writer : write_all) (lane->file, pieces, count, (int64_t) (lsn - lane->segment_lsn), flags);
	if (error == 0 && early && fdatasync(lane->file) != 0)
		error = errno;
	return error;
}

/* Whether these bytes, of which more may come, can be an append of which not all is here. */
static bool
is_part_of_append(const uint8_t *bytes, size_t count)
{
	if (!may_be_copy_data(bytes, count, APPEND))
		return false;
	if (count >= FRAME_HEAD)
	{
		uint32_t	length = lane_u32(bytes + AT_LENGTH);

		return length >= APPEND_FRAME - 1 && length < APPEND_FRAME + APPEND_MOST_BYTES && count < 1 + (size_t) length;
	}
	return true;
}

static void
fail(AppendLane *lane, int error)
{
	lane->error = error;
	lane->plain_end = 0;
	lane->lane.wants = 1;
	lane_touch(&lane->lane);
}

/*
 * Take the appends at the beginning of these bytes; how many bytes they were.  Unless that is 0, all of them are durable and
 * `answer` answers them.
 */
size_t
append_lane_take(AppendLane *lane, const uint8_t *bytes, size_t count)
{
	struct iovec pieces[MOST_PIECES];
	int			npieces = 0;
	uint64_t	appends = 0;
	size_t		at = 0;
	uint64_t	begin_lsn = lane->write_lsn,
				written_lsn = begin_lsn,	/* up to here the file has it, perhaps not durably */
				end_lsn = begin_lsn,
				commit_lsn = lane->commit_lsn,
				truncate_lsn = lane->truncate_lsn;
	int64_t		began_ns;
	int			error = 0;

	if (lane->error != APPEND_FINE || lane->writes == APPEND_WRITES)
		return 0;
	while (count - at > APPEND_FRAME && appends < MOST_PIECES)
	{
		const uint8_t *append = bytes + at;
		uint64_t	size = lane_u64(append + AT_END) - end_lsn;

		if (append[0] != COPY_DATA || append[AT_KIND] != APPEND || lane_u32(append + AT_GENERATION) != lane->generation ||
			lane_u64(append + AT_TERM) != lane->term || lane_u64(append + AT_BEGIN) != end_lsn || size == 0 ||
			size > APPEND_MOST_BYTES || lane_u32(append + AT_LENGTH) != APPEND_FRAME - 1 + size ||
			count - at < APPEND_FRAME + size || end_lsn + size > lane->plain_end)
			break;
		if (walscan_feed(lane->scanner, append + APPEND_FRAME, size) != 0)
		{
			fail(lane, APPEND_NOT_WAL);
			return 0;
		}
		pieces[npieces].iov_base = (void *) (append + APPEND_FRAME);
		pieces[npieces++].iov_len = size;
		appends++;
		if (lane_u64(append + AT_COMMIT) > commit_lsn)
			commit_lsn = lane_u64(append + AT_COMMIT);
		if (lane_u64(append + AT_TRUNCATE) > truncate_lsn)
			truncate_lsn = lane_u64(append + AT_TRUNCATE);
		end_lsn += size;
		at += APPEND_FRAME + size;
		if (lane->early_bytes != 0 && end_lsn - written_lsn >= lane->early_bytes)
		{
			error = write_early(lane, pieces, npieces, written_lsn, end_lsn);
			if (error != 0)
				break;
			written_lsn = end_lsn;
			npieces = 0;
		}
	}
	if (appends == 0)
		return 0;
	began_ns = lane_now_ns();
	if (error == 0)
		error = finish(lane, pieces, npieces, written_lsn, written_lsn > begin_lsn);
	if (error != 0)
	{
		fail(lane, error);
		return 0;
	}
	lane->sizes[lane->writes] = end_lsn - begin_lsn;
	lane->took_ns[lane->writes++] = lane_now_ns() - began_ns;
	lane->write_lsn = end_lsn;
	lane->flush_lsn = lane->scanner->record_end_lsn;
	lane->commit_lsn = commit_lsn;
	lane->truncate_lsn = truncate_lsn;
	lane->appends += appends;
	lane_touch(&lane->lane);
	lane_put_u64(lane->answer + ANSWER_FLUSH,
				 lane->flush_lsn > lane->timeline_start_lsn ? lane->flush_lsn : lane->timeline_start_lsn);
	return at;
}

/* Python tells others of what was taken: now, or, if that was done just before, for all that comes meanwhile. */
static void
tell(AppendLane *lane)
{
	int64_t		now_ns = lane_now_ns();

	if (now_ns - lane->told_ns >= lane->tell_ns)
	{
		lane->told_ns = now_ns;
		lane->lane.wants = 1;
	}
	else
		lane->lane.due_ns = lane->told_ns + lane->tell_ns;
}

void
append_lane_due(Lane *base, int64_t now_ns)
{
	((AppendLane *) base)->told_ns = now_ns;
	base->wants = 1;
}

LaneResult
append_lane_readable(Lane *base)
{
	AppendLane *lane = (AppendLane *) base;
	size_t		taken;

	if (!lane_receive(base))
		return LANE_LEAVES;
	taken = append_lane_take(lane, base->buffer, base->filled);
	if (taken > 0)
	{
		lane->unsent = (uint32_t) (APPEND_ANSWER - lane_send(base, lane->answer, APPEND_ANSWER, NULL, 0, NULL, 0));
		if (lane->unsent || lane->writes == APPEND_WRITES)
			base->wants = 1;
		else if (base->due_ns == 0)
			tell(lane);
		lane_drop(base, taken);
	}
	if (lane->error == APPEND_FINE && is_part_of_append(base->buffer, base->filled))
		return LANE_TOOK;
	return LANE_LEAVES;
}
