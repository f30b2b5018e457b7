/*
 * readahead.c
 *		Pages on their way: a ring per process of requested and received pages.
 *
 * Responses come in the order of the requests, so a request's number is its
 * place in the ring.  A page stays in the ring until it is installed or its
 * place is needed; what is in the ring is the base image and never gets stale,
 * because it is looked at only while the map says that the block is absent.
 */
#include "neon.h"

#include <sys/mman.h>

#include "access/xlogdefs.h"

#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define STREAMS			8		/* sequential scans that one process is followed in */
#define WAIT_SLICE_MS	500		/* how often a waiting process looks for a moved pageserver */
#define BACKOFF_MS_MAX	1000

typedef enum SlotState
{
	SLOT_EMPTY, SLOT_IN_FLIGHT, SLOT_PAGE, SLOT_ERROR
} SlotState;

typedef struct Slot
{
	NeonMapEntry *entry;
	BlockNumber block;
	SlotState	state;			/* SLOT_ERROR: its page holds the message */
} Slot;

typedef struct Stream
{
	NeonMapEntry *entry;
	BlockNumber next;			/* where the next miss would go on */
	BlockNumber requested;		/* blocks before this one have been asked for */
	uint32		window;
} Stream;

/* How long one read has been failing. */
typedef struct Retry
{
	TimestampTz deadline;		/* 0 before the first failure */
	int			attempts;
	int			backoff_ms;
} Retry;

static uint32 ring_size = 0;	/* power of two */
static char *ring_pages;
static Slot *ring;
static uint64 ring_head = 0;	/* next request */
static uint64 ring_received = 0;	/* next response */
static uint64 ring_tail = 0;	/* oldest slot in use */
static Stream streams[STREAMS];
static int	stream_victim = 0;

#define SLOT(i)	(&ring[(i) & (ring_size - 1)])
#define PAGE(i)	(ring_pages + ((i) & (ring_size - 1)) * (size_t) BLCKSZ)

static void
make_ring(void)
{
	uint32		size = 32;
	size_t		pages_bytes;

	while (size < 2 * (uint32) neon_readahead_buffer_size)
		size *= 2;
	pages_bytes = (size_t) size * BLCKSZ;
	ring_pages = mmap(NULL, pages_bytes + size * sizeof(Slot), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ring_pages == MAP_FAILED)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("could not allocate the read-ahead buffer: %m")));
	ring = (Slot *) (ring_pages + pages_bytes);
	ring_size = size;
}

/* After a lost connection the answers will not come; pages that are here stay good. */
static void
forget_in_flight(void)
{
	for (uint64 i = ring_received; i < ring_head; i++)
		SLOT(i)->state = SLOT_EMPTY;
	ring_received = ring_head;
}

static bool
lost(void)
{
	neon_pagestream_disconnect();
	forget_in_flight();
	return false;
}

static bool
take_response(const NeonPageResponse *response)
{
	Slot	   *slot = SLOT(ring_received);

	if (ring_received == ring_head || response->request_id != ring_received)
		return false;
	if (response->error != NULL)
	{
		strlcpy(PAGE(ring_received), response->error, BLCKSZ);
		slot->state = SLOT_ERROR;
	}
	else
	{
		if (response->block != slot->block || response->rel != slot->entry->rel || response->db != slot->entry->db ||
			response->spc != slot->entry->spc || response->fork != slot->entry->fork)
			return false;
		memcpy(PAGE(ring_received), response->page, BLCKSZ);
		slot->state = SLOT_PAGE;
	}
	ring_received++;
	return true;
}

/* Take all responses that are here.  False when the connection is broken. */
static bool
pump(void)
{
	NeonPageResponse response;
	NeonReceived what;
	uint64		before = ring_received;

	while (ring_received < ring_head && (what = neon_pagestream_receive(&response)) != NEON_RECEIVED_NOTHING)
	{
		if (what == NEON_RECEIVED_BROKEN)
			return lost();
		if (!take_response(&response))
		{
			ereport(LOG,
					(errcode(ERRCODE_PROTOCOL_VIOLATION),
					 errmsg("pageserver %s answered another request than the one that was due", neon_pagestream_peer())));
			return lost();
		}
	}
	if (ring_received > before)
		neon_count(NEON_PAGES_FETCHED, ring_received - before);
	return true;
}

/* Wait until slot i has its answer.  False when the connection is broken. */
static bool
wait_for_slot(uint64 i)
{
	TimestampTz started = 0;
	bool		logged = false;

	for (;;)
	{
		if (!pump())
			return false;
		if (SLOT(i)->state != SLOT_IN_FLIGHT)
			return true;
		if (started == 0)
		{
			started = GetCurrentTimestamp();
			neon_count(NEON_READS_WAITED, 1);
		}
		else if (neon_pageserver_response_disconnect_timeout > 0 &&
				 TimestampDifferenceExceeds(started, GetCurrentTimestamp(), neon_pageserver_response_disconnect_timeout))
		{
			ereport(LOG,
					(errmsg("no answer from pageserver %s for %d ms, connecting anew",
							neon_pagestream_peer(), neon_pageserver_response_disconnect_timeout)));
			return lost();
		}
		else if (!logged && neon_pageserver_response_log_timeout > 0 &&
				 TimestampDifferenceExceeds(started, GetCurrentTimestamp(), neon_pageserver_response_log_timeout))
		{
			ereport(LOG,
					(errmsg("no answer from pageserver %s for %d ms, still waiting",
							neon_pagestream_peer(), neon_pageserver_response_log_timeout)));
			logged = true;
		}
		neon_pagestream_wait(WAIT_SLICE_MS);
		if (!neon_pagestream_connected())
			return lost();
	}
}

/* Ask for count blocks from block on.  False when the connection is broken. */
static bool
request_run(NeonMapEntry *entry, BlockNumber block, uint32 count)
{
	for (uint32 n = 0; n < count; n++)
	{
		Slot	   *slot;

		if (ring_head - ring_tail == ring_size)
		{
			/* the oldest place is needed: its page was not wanted so far */
			if (SLOT(ring_tail)->state == SLOT_IN_FLIGHT &&
				(!neon_pagestream_flush() || !wait_for_slot(ring_tail)))
				return lost();
			SLOT(ring_tail)->state = SLOT_EMPTY;
			ring_tail++;
		}
		if (!neon_pagestream_request(ring_head, entry, block + n))
			return lost();
		slot = SLOT(ring_head);
		slot->entry = entry;
		slot->block = block + n;
		slot->state = SLOT_IN_FLIGHT;
		ring_head++;
	}
	return neon_pagestream_flush() || lost();
}

/* The slot of a block, or -1. */
static int64
find_slot(const NeonMapEntry *entry, BlockNumber block)
{
	for (uint64 i = ring_tail; i < ring_head; i++)
		if (SLOT(i)->block == block && SLOT(i)->entry == entry && SLOT(i)->state != SLOT_EMPTY)
			return (int64) i;
	return -1;
}

/* Number of absent blocks in a row from block on, at most max. */
static uint32
absent_run(const NeonMapEntry *entry, BlockNumber block, uint32 max)
{
	uint32		n = 0;

	while (n < max && neon_block_absent(entry, block + n))
		n++;
	return n;
}

/* The sequential stream that a miss continues, or a new one. */
static Stream *
stream_of(NeonMapEntry *entry, BlockNumber block)
{
	Stream	   *stream;
	uint32		max = Min((uint32) neon_readahead_buffer_size, ring_size / 2);

	for (int i = 0; i < STREAMS; i++)
		if (streams[i].entry == entry && streams[i].next == block)
		{
			streams[i].window = Min(Max(streams[i].window * 2, 8), max);
			streams[i].requested = Max(streams[i].requested, block);
			return &streams[i];
		}
	stream = &streams[stream_victim++ % STREAMS];
	stream->entry = entry;
	stream->window = 1;
	stream->next = stream->requested = block;
	return stream;
}

/*
 * Make sure that the block is asked for, and that the stream's window behind it
 * is as well.  Returns its slot, or -1 when the connection is broken.
 */
static int64
request_block(NeonMapEntry *entry, BlockNumber block, Stream *stream)
{
	for (;;)
	{
		int64		slot = find_slot(entry, block);

		if (slot < 0)
		{
			uint32		count = Max(1, absent_run(entry, block, stream->window));

			if (!request_run(entry, block, count))
				return -1;
			stream->requested = Max(stream->requested, block + count);
			slot = find_slot(entry, block);
		}
		if (slot >= 0 && stream->window > 1 && stream->requested - block <= stream->window / 2)
		{
			uint32		count = absent_run(entry, stream->requested, stream->window);

			if (count > 0)
			{
				if (!request_run(entry, stream->requested, count))
					return -1;
				stream->requested += count;
				slot = find_slot(entry, block); /* its place may have been needed */
			}
		}
		if (slot >= 0)
			return slot;
	}
}

/* After a failure: wait before the next attempt, or give up with an ERROR. */
static void
back_off(Retry *retry, const NeonMapEntry *entry, BlockNumber block)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz until;

	neon_count(NEON_RECONNECTS, 1);
	if (retry->deadline == 0)
	{
		/* a connection that was idle may simply be gone: the first new attempt is at once */
		retry->deadline = TimestampTzPlusMilliseconds(now, neon_pageserver_retry_timeout);
		retry->backoff_ms = 5;
		return;
	}
	if (now >= retry->deadline || ++retry->attempts > neon_max_reconnect_attempts)
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("could not read block %u of relation %u/%u/%u fork %u from pageserver %s",
						block, entry->spc, entry->db, entry->rel, entry->fork, neon_pagestream_peer()),
				 errdetail("Last failure: %s.", neon_pagestream_error()),
				 errhint("The statement can be repeated when the pageserver is reachable again.")));
	until = Min(TimestampTzPlusMilliseconds(now, retry->backoff_ms), retry->deadline);
	retry->backoff_ms = Min(retry->backoff_ms * 2, BACKOFF_MS_MAX);
	while ((now = GetCurrentTimestamp()) < until)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 TimestampDifferenceMilliseconds(now, until), PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* Received pages in a row from slot i on that one write can install. */
static uint32
received_run(uint64 i)
{
	const Slot *first = SLOT(i);
	uint32		n = 1;

	while (i + n < ring_received && ((i + n) & (ring_size - 1)) != 0 &&
		   (first->block + n) % NEON_CHUNK_BLOCKS != 0 &&
		   SLOT(i + n)->state == SLOT_PAGE && SLOT(i + n)->entry == first->entry && SLOT(i + n)->block == first->block + n)
		n++;
	return n;
}

static uint64 current_run;		/* slot of the run that the caller is looking at */
static Stream *current_stream;

/*
 * Get the base image of an absent block.  *pages is set to its page, followed by
 * those of the next blocks that have arrived too; returns how many there are.
 * They stay valid until neon_fetched_run_done().
 */
uint32
neon_fetch_run(NeonMapEntry *entry, BlockNumber block, char **pages)
{
	Retry		retry = {0};
	Stream	   *stream;

	if (ring_size == 0)
		make_ring();
	stream = stream_of(entry, block);
	for (;;)
	{
		int64		slot = find_slot(entry, block);

		if (slot < 0 || SLOT(slot)->state == SLOT_IN_FLIGHT || neon_pagestream_connected())
		{
			if (!neon_pagestream_connected() && (forget_in_flight(), !neon_pagestream_connect()))
			{
				back_off(&retry, entry, block);
				continue;
			}
			slot = request_block(entry, block, stream);
			if (slot < 0 || !wait_for_slot(slot))
			{
				back_off(&retry, entry, block);
				continue;
			}
		}
		if (SLOT(slot)->state == SLOT_ERROR)
		{
			char	   *message = pstrdup(PAGE(slot));

			SLOT(slot)->state = SLOT_EMPTY;
			ereport(ERROR,
					(errcode(ERRCODE_IO_ERROR),
					 errmsg("pageserver %s could not supply block %u of relation %u/%u/%u fork %u at %X/%X",
							neon_pagestream_peer(), block, entry->spc, entry->db, entry->rel, entry->fork,
							LSN_FORMAT_ARGS(neon_map->base_lsn)),
					 errdetail("%s", message)));
		}
		Assert(SLOT(slot)->state == SLOT_PAGE);
		*pages = PAGE(slot);
		current_run = slot;
		current_stream = stream;
		stream->next = block + 1;
		return received_run(slot);
	}
}

/* The first count pages of the run are installed (or were not needed): their places are free. */
void
neon_fetched_run_done(BlockNumber block, uint32 count)
{
	for (uint32 n = 0; n < count; n++)
		SLOT(current_run + n)->state = SLOT_EMPTY;
	while (ring_tail < ring_received && SLOT(ring_tail)->state == SLOT_EMPTY)
		ring_tail++;
	/* the installed blocks will be found locally: a sequential scan misses next behind them */
	current_stream->next = block + count;
}

/* A hint that the block will be read: ask for it, if that needs no waiting. */
void
neon_prefetch_block(NeonMapEntry *entry, BlockNumber block)
{
	if (!neon_pagestream_connected() || find_slot(entry, block) >= 0)
		return;
	if (ring_head - ring_tail == ring_size && SLOT(ring_tail)->state == SLOT_IN_FLIGHT)
		return;
	request_run(entry, block, 1);
}
