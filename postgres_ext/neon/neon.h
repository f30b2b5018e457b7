/*
 * neon.h
 *		A stateless compute on an unmodified Postgres.
 *
 * Local relation files are a sparse, correctly sized cache of the database as it
 * was at one LSN, the base LSN.  The block map says which blocks of that image
 * are present; an absent block is fetched from the pageserver as of the base
 * LSN when it is read first.  A block written locally stays local.
 *
 * Invariant: no block is ever read from a local file before the map says that it
 * is present, and the map never says so before the file holds the block.
 */
#ifndef NEON_H
#define NEON_H

#include "pgcompat.h"

#include "port/atomics.h"
#include "storage/lwlock.h"

/* ---- settings.c: what the operator may choose */
extern char *neon_tenant_id;
extern char *neon_timeline_id;
extern char *neon_pageserver_connstring;
extern int	neon_max_reconnect_attempts;
extern int	neon_pageserver_retry_timeout;	/* ms */
extern int	neon_pageserver_response_log_timeout;	/* ms */
extern int	neon_pageserver_response_disconnect_timeout;	/* ms */
extern int	neon_readahead_buffer_size; /* blocks */
extern int	neon_fill_delay;	/* ms, -1 = never */
extern bool neon_regress_test_mode;
extern void neon_define_settings(void);

/* ---- neon.c: what all processes share */
#define NEON_CONNSTRING_SIZE 4096

typedef struct NeonShared
{
	pg_atomic_uint32 selftest_passed;	/* the wrappers were seen to be called */
	pg_atomic_uint64 connstring_begun;	/* a reader's copy is good when both */
	pg_atomic_uint64 connstring_done;	/* are equal before and after copying */
	char		connstring[NEON_CONNSTRING_SIZE];
} NeonShared;

extern NeonShared *neon_shared;
extern LWLockPadded *neon_locks;
extern void neon_publish_connstring(const char *connstring);
extern uint64 neon_connstring_generation(void);
extern uint64 neon_copy_connstring(char *copy);

/* ---- block_map.c: which blocks are here */
#define NEON_MAP_FILE		"neon.map"
#define NEON_MAP_MAGIC		UINT64CONST(0x3150414D4E4F454E)	/* "NEONMAP1" */
#define NEON_MAP_VERSION	1
#define NEON_MAP_HEADER_SIZE 4096

typedef enum NeonEntryState
{
	NEON_ENTRY_EMPTY = 0,		/* unused slot of the table */
	NEON_ENTRY_FILE = 1,		/* its files exist (or it is gone for good) */
	NEON_ENTRY_NO_FILE = 2		/* its sparse files are still to be made */
} NeonEntryState;

typedef struct NeonMapEntry
{
	uint32		spc;
	uint32		db;
	uint32		rel;
	uint32		fork;
	uint32		base_nblocks;	/* blocks below still belong to the base image */
	uint32		state;			/* NeonEntryState */
	uint64		bitmap_offset;	/* of this fork's presence bits in the map file */
} NeonMapEntry;

typedef enum NeonCounter
{
	NEON_PAGES_FETCHED,			/* pages received from the pageserver */
	NEON_PAGES_INSTALLED,
	NEON_INSTALLS,				/* writes that installed them */
	NEON_READS_WAITED,			/* reads that had to wait for the network */
	NEON_RECONNECTS,
	NEON_COUNTERS = 16
} NeonCounter;

typedef struct NeonMapHeader
{
	uint64		magic;
	uint32		version;
	uint32		crc;			/* CRC-32C of the fields from system_identifier to fixed_end */
	uint64		system_identifier;
	uint64		base_lsn;
	uint64		total_size;		/* of the file */
	uint64		nslots;			/* slots of the table; the last one is always empty */
	uint64		nhome;			/* power of two: an entry's search begins at hash % nhome */
	uint64		nentries;
	uint8		tenant_id[16];
	uint8		timeline_id[16];
	uint64		fixed_end;		/* zero; nothing behind is covered by the checksum */
	pg_atomic_uint64 counters[NEON_COUNTERS];
} NeonMapHeader;

extern NeonMapHeader *neon_map;
extern NeonMapEntry *neon_entries;
extern void neon_map_open(void);
extern bool neon_entry_ensure_files(NeonMapEntry *entry, bool missing_ok);
extern void neon_entry_forget(NeonMapEntry *entry);
extern void neon_count(NeonCounter counter, uint64 n);

#define NEON_CHUNK_BLOCKS	128 /* blocks that one lock covers; an install never crosses a chunk */
#define NEON_LOCKS			256

/*
 * Excludes "install the base image of an absent block" against "first local
 * write of an absent block".  The buffer manager does so for its own I/O, but
 * smgrread() is also called outside of it.
 */
static inline LWLock *
neon_entry_lock(const NeonMapEntry *entry, BlockNumber block)
{
	uint32		stripe = (uint32) (entry - neon_entries) * 31 + block / NEON_CHUNK_BLOCKS;

	return &neon_locks[stripe % NEON_LOCKS].lock;
}

static inline uint8 *
neon_entry_bitmap(const NeonMapEntry *entry)
{
	return (uint8 *) neon_map + entry->bitmap_offset;
}

static inline NeonMapEntry *
neon_map_lookup(const NeonRelFile *file, ForkNumber fork)
{
	uint32		hash;

	if (NeonIsTemp(*file))
		return NULL;
	hash = NeonSpcOid(*file) * 0x9E3779B1u ^ NeonDbOid(*file) * 0x85EBCA6Bu ^
		NeonRelNumber(*file) * 0xC2B2AE35u ^ (uint32) fork * 0x27D4EB2Fu;
	hash ^= hash >> 15;
	/* the search ends: the last slot is always empty */
	for (NeonMapEntry *entry = &neon_entries[hash & (neon_map->nhome - 1)];; entry++)
	{
		if (entry->state == NEON_ENTRY_EMPTY)
			return NULL;
		if (entry->rel == NeonRelNumber(*file) && entry->db == NeonDbOid(*file) &&
			entry->spc == NeonSpcOid(*file) && entry->fork == (uint32) fork)
			return entry;
	}
}

/* Does the block still have to come from the pageserver?  entry may be NULL. */
static inline bool
neon_block_absent(const NeonMapEntry *entry, BlockNumber block)
{
	if (entry == NULL || block >= __atomic_load_n(&entry->base_nblocks, __ATOMIC_ACQUIRE))
		return false;
	return (__atomic_load_n(&neon_entry_bitmap(entry)[block >> 3], __ATOMIC_ACQUIRE) & (1 << (block & 7))) == 0;
}

/* The local file holds the block now.  entry may be NULL. */
static inline void
neon_block_mark(NeonMapEntry *entry, BlockNumber block)
{
	uint8	   *byte;
	uint8		bit = (uint8) (1 << (block & 7));

	if (entry == NULL || block >= __atomic_load_n(&entry->base_nblocks, __ATOMIC_ACQUIRE))
		return;
	byte = &neon_entry_bitmap(entry)[block >> 3];
	if (!(__atomic_load_n(byte, __ATOMIC_RELAXED) & bit))
		__atomic_fetch_or(byte, bit, __ATOMIC_RELEASE);
}

/* Blocks from nblocks on are not part of the base image any more.  entry may be NULL. */
static inline void
neon_entry_limit(NeonMapEntry *entry, BlockNumber nblocks)
{
	if (entry && __atomic_load_n(&entry->base_nblocks, __ATOMIC_RELAXED) > nblocks)
		__atomic_store_n(&entry->base_nblocks, nblocks, __ATOMIC_RELEASE);
}

/* ---- hydrate.c: the wrappers around md.c */
typedef enum NeonWrapper
{
	NEON_CREATE, NEON_EXISTS, NEON_UNLINK, NEON_EXTEND, NEON_PREFETCH, NEON_READ,
	NEON_WRITE, NEON_NBLOCKS, NEON_TRUNCATE, NEON_ZEROEXTEND, NEON_WRAPPERS
} NeonWrapper;

extern uint64 neon_wrapper_calls[NEON_WRAPPERS];	/* of this process */

typedef struct NeonOverride
{
	void	   *original;		/* a function of md.c */
	void	   *wrapper;
	const char *name;
	NeonWrapper kind;
} NeonOverride;

extern const NeonOverride neon_overrides[];
extern const int neon_overrides_count;

/* ---- smgr_override.c */
extern void neon_install_overrides(void);

/* ---- readahead.c: pages on their way */
extern uint32 neon_fetch_run(NeonMapEntry *entry, BlockNumber block, char **pages);
extern void neon_fetched_run_done(BlockNumber block, uint32 count);
extern void neon_prefetch_block(NeonMapEntry *entry, BlockNumber block);

/* ---- pagestream.c: one connection to the pageserver */
typedef struct NeonPageResponse
{
	uint64		request_id;
	const char *error;			/* NULL when the answer is a page */
	const char *page;			/* valid until the next receive */
	uint32		spc,
				db,
				rel,
				fork,
				block;			/* what the pageserver says it answers (pages only) */
} NeonPageResponse;

typedef enum NeonReceived
{
	NEON_RECEIVED_BROKEN = -1,	/* neon_pagestream_error() says why */
	NEON_RECEIVED_NOTHING = 0,
	NEON_RECEIVED_RESPONSE = 1
} NeonReceived;

extern bool neon_pagestream_connected(void);
extern bool neon_pagestream_connect(void);
extern void neon_pagestream_disconnect(void);
extern bool neon_pagestream_request(uint64 request_id, const NeonMapEntry *entry, BlockNumber block);
extern bool neon_pagestream_flush(void);
extern NeonReceived neon_pagestream_receive(NeonPageResponse *response);
extern void neon_pagestream_wait(long timeout_ms);
extern const char *neon_pagestream_error(void);
extern const char *neon_pagestream_peer(void);

/* ---- guard.c: the directory is useless without this library */
extern void neon_guard_check(void);

/* ---- utility.c: statements that would copy files behind the storage manager */
extern void neon_install_utility_hook(void);

/* ---- worker.c: self-test, then files for all relations */
extern void neon_register_worker(void);
extern PGDLLEXPORT void neon_worker_main(Datum arg);

#endif							/* NEON_H */
