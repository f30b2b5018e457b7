/*
 * hydrate.c
 *		Wrappers around md.c: an absent block is fetched before it is read.
 *
 * Order is everything.  A read installs the block, then sets its bit.  A write
 * writes, then sets the bit.  Truncation and removal lower base_nblocks first,
 * because there is no way back from them; creation forgets the base image last,
 * because it may fail.  The wrappers of truncate, write and unlink run in
 * critical sections or after commit: they neither allocate nor throw beyond what
 * md.c does itself.
 */
#include "neon.h"

#include <fcntl.h>
#include <unistd.h>

#include "access/xlog.h"
#include "storage/bufpage.h"
#include "storage/fd.h"
#include "storage/md.h"
#include "utils/wait_event.h"

uint64		neon_wrapper_calls[NEON_WRAPPERS];

#define COUNT_CALL(kind) (neon_wrapper_calls[kind]++)

static NeonMapEntry *
entry_with_files(SMgrRelation reln, ForkNumber fork)
{
	NeonMapEntry *entry = neon_map_lookup(&NeonRelFileOf(reln), fork);

	if (entry != NULL && unlikely(__atomic_load_n(&entry->state, __ATOMIC_ACQUIRE) == NEON_ENTRY_NO_FILE))
		neon_entry_ensure_files(entry, false);
	return entry;
}

static bool
neon_exists(SMgrRelation reln, ForkNumber fork)
{
	COUNT_CALL(NEON_EXISTS);
	entry_with_files(reln, fork);
	return mdexists(reln, fork);
}

static BlockNumber
neon_nblocks(SMgrRelation reln, ForkNumber fork)
{
	COUNT_CALL(NEON_NBLOCKS);
	entry_with_files(reln, fork);
	return mdnblocks(reln, fork);
}

static void
neon_create(SMgrRelation reln, ForkNumber fork, bool isRedo)
{
	NeonMapEntry *entry;

	COUNT_CALL(NEON_CREATE);
	entry = entry_with_files(reln, fork);
	/* redo "creates" every file before it touches a page: that must not reset an existing one */
	if (entry && isRedo && entry->base_nblocks > 0 &&
		(reln->md_num_open_segs[fork] > 0 || mdexists(reln, fork)))
		return;
	mdcreate(reln, fork, isRedo);
	neon_entry_limit(entry, 0);
}

static void
neon_unlink(NeonRelFile file, ForkNumber fork, bool isRedo)
{
	COUNT_CALL(NEON_UNLINK);
	if (fork == InvalidForkNumber)
		for (int each = 0; each <= MAX_FORKNUM; each++)
			neon_entry_forget(neon_map_lookup(&file, (ForkNumber) each));
	else
		neon_entry_forget(neon_map_lookup(&file, fork));
	mdunlink(file, fork, isRedo);
}

static void
neon_truncate(SMgrRelation reln, ForkNumber fork, BlockNumber old_blocks, BlockNumber nblocks)
{
	COUNT_CALL(NEON_TRUNCATE);
	/* (the server asked for the size before: the files exist) */
	neon_entry_limit(neon_map_lookup(&NeonRelFileOf(reln), fork), nblocks);
	mdtruncate(reln, fork, old_blocks, nblocks);
}

static void
neon_extend(SMgrRelation reln, ForkNumber fork, BlockNumber block, NeonWriteBuffer buffer, bool skip_fsync)
{
	NeonMapEntry *entry;

	COUNT_CALL(NEON_EXTEND);
	entry = entry_with_files(reln, fork);
	/* the file is a cache: durability is the safekeepers' */
	mdextend(reln, fork, block, buffer, skip_fsync || entry != NULL);
	neon_block_mark(entry, block);
}

#if PG_VERSION_NUM >= 160000
static void
neon_zeroextend(SMgrRelation reln, ForkNumber fork, BlockNumber block, int nblocks, bool skip_fsync)
{
	NeonMapEntry *entry;

	COUNT_CALL(NEON_ZEROEXTEND);
	entry = entry_with_files(reln, fork);
	mdzeroextend(reln, fork, block, nblocks, skip_fsync || entry != NULL);
	for (int i = 0; i < nblocks; i++)
		neon_block_mark(entry, block + i);
}
#endif

static inline void
md_read_one(SMgrRelation reln, ForkNumber fork, BlockNumber block, void *buffer)
{
#if NEON_VECTORED
	mdreadv(reln, fork, block, &buffer, 1);
#else
	mdread(reln, fork, block, buffer);
#endif
}

static inline void
md_write_one(SMgrRelation reln, ForkNumber fork, BlockNumber block, void *page)
{
#if NEON_VECTORED
	const void *pages = page;

	mdwritev(reln, fork, block, &pages, 1, true);
#else
	mdwrite(reln, fork, block, page, true);
#endif
}

/*
 * Write count consecutive pages at once.  One large write into a sparse file
 * gives the page cache large folios; block by block, later reads are slower.
 */
static void
write_run(NeonMapEntry *entry, BlockNumber block, char *pages, uint32 count)
{
	char	   *path = GetRelationPath(entry->db, entry->spc, entry->rel, NEON_NO_BACKEND, (ForkNumber) entry->fork);
	char		name[MAXPGPATH];
	uint32		segment = block / RELSEG_SIZE;
	size_t		size = (size_t) count * BLCKSZ;
	ssize_t		written;
	int			fd;

	if (segment == 0)
		strlcpy(name, path, sizeof(name));
	else
		snprintf(name, sizeof(name), "%s.%u", path, segment);
	pfree(path);
	fd = OpenTransientFile(name, O_RDWR | PG_BINARY);
	if (fd < 0)
		ereport(ERROR, (errcode_for_file_access(), errmsg("could not open file \"%s\": %m", name)));
	errno = 0;
	written = pwrite(fd, pages, size, (off_t) (block % RELSEG_SIZE) * BLCKSZ);
	if (written != (ssize_t) size)
	{
		if (errno == 0)
			errno = ENOSPC;
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not write blocks %u to %u of file \"%s\": %m", block, block + count - 1, name)));
	}
	CloseTransientFile(fd);
}

/*
 * Read an absent block: fetch it, and install it together with the blocks behind
 * it that have arrived as well.
 */
static void
read_absent(SMgrRelation reln, NeonMapEntry *entry, ForkNumber fork, BlockNumber block, void *buffer)
{
	char	   *pages;
	uint32		count = neon_fetch_run(entry, block, &pages);
	uint32		install = 0;
	LWLock	   *lock = neon_entry_lock(entry, block);

	/* pages rebuilt from WAL carry no checksum; the buffer manager verifies it if the cluster has them */
	for (uint32 i = 0; i < count; i++)
		PageSetChecksumInplace(pages + (size_t) i * BLCKSZ, block + i);
	LWLockAcquire(lock, LW_EXCLUSIVE);
	while (install < count && neon_block_absent(entry, block + install))
		install++;
	if (install == 0)
	{
		/* somebody else installed, wrote or truncated it meanwhile */
		LWLockRelease(lock);
		neon_fetched_run_done(block, 1);
		md_read_one(reln, fork, block, buffer);
		return;
	}
	if (install == 1)
		md_write_one(reln, fork, block, pages);
	else
		write_run(entry, block, pages, install);
	for (uint32 i = 0; i < install; i++)
		neon_block_mark(entry, block + i);
	LWLockRelease(lock);
	memcpy(buffer, pages, BLCKSZ);
	neon_fetched_run_done(block, install);
	neon_count(NEON_INSTALLS, 1);
	neon_count(NEON_PAGES_INSTALLED, install);
}

#if NEON_VECTORED
static void
neon_readv(SMgrRelation reln, ForkNumber fork, BlockNumber block, void **buffers, BlockNumber nblocks)
{
	NeonMapEntry *entry;
	BlockNumber i = 0;

	COUNT_CALL(NEON_READ);
	entry = entry_with_files(reln, fork);
	while (i < nblocks)
	{
		BlockNumber end = i;

		while (end < nblocks && !neon_block_absent(entry, block + end))
			end++;
		if (end > i)
			mdreadv(reln, fork, block + i, buffers + i, end - i);
		for (i = end; i < nblocks && neon_block_absent(entry, block + i); i++)
			read_absent(reln, entry, fork, block + i, buffers[i]);
	}
}

static void
neon_writev(SMgrRelation reln, ForkNumber fork, BlockNumber block, const void **buffers,
			BlockNumber nblocks, bool skip_fsync)
{
	NeonMapEntry *entry;
	BlockNumber i = 0;

	COUNT_CALL(NEON_WRITE);
	entry = entry_with_files(reln, fork);
	while (i < nblocks)
	{
		BlockNumber end = i;

		while (end < nblocks && !neon_block_absent(entry, block + end))
			end++;
		if (end > i)
			mdwritev(reln, fork, block + i, buffers + i, end - i, skip_fsync || entry != NULL);
		for (i = end; i < nblocks && neon_block_absent(entry, block + i); i++)
		{
			LWLock	   *lock = neon_entry_lock(entry, block + i);

			LWLockAcquire(lock, LW_EXCLUSIVE);
			mdwritev(reln, fork, block + i, buffers + i, 1, true);
			neon_block_mark(entry, block + i);
			LWLockRelease(lock);
		}
	}
}

static bool
neon_prefetch(SMgrRelation reln, ForkNumber fork, BlockNumber block, int nblocks)
{
	NeonMapEntry *entry;
	bool		result = true;

	COUNT_CALL(NEON_PREFETCH);
	entry = entry_with_files(reln, fork);
	for (int i = 0; i < nblocks; i++)
	{
		if (neon_block_absent(entry, block + i))
			neon_prefetch_block(entry, block + i);
		else
			result = mdprefetch(reln, fork, block + i, 1) && result;
	}
	return result;
}
#else
static void
neon_read(SMgrRelation reln, ForkNumber fork, BlockNumber block, NeonReadBuffer buffer)
{
	NeonMapEntry *entry;

	COUNT_CALL(NEON_READ);
	entry = entry_with_files(reln, fork);
	if (unlikely(neon_block_absent(entry, block)))
		read_absent(reln, entry, fork, block, buffer);
	else
		md_read_one(reln, fork, block, buffer);
}

static void
neon_write(SMgrRelation reln, ForkNumber fork, BlockNumber block, NeonWriteBuffer buffer, bool skip_fsync)
{
	NeonMapEntry *entry;
	LWLock	   *lock;

	COUNT_CALL(NEON_WRITE);
	entry = entry_with_files(reln, fork);
	if (likely(!neon_block_absent(entry, block)))
	{
		mdwrite(reln, fork, block, buffer, skip_fsync || entry != NULL);
		return;
	}
	lock = neon_entry_lock(entry, block);
	LWLockAcquire(lock, LW_EXCLUSIVE);
	mdwrite(reln, fork, block, buffer, true);
	neon_block_mark(entry, block);
	LWLockRelease(lock);
}

static bool
neon_prefetch(SMgrRelation reln, ForkNumber fork, BlockNumber block)
{
	NeonMapEntry *entry;

	COUNT_CALL(NEON_PREFETCH);
	entry = entry_with_files(reln, fork);
	if (!neon_block_absent(entry, block))
		return mdprefetch(reln, fork, block);
	neon_prefetch_block(entry, block);
	return true;
}
#endif

#define OVERRIDE(function, wrapper, kind) {(void *) (function), (void *) (wrapper), #function, kind}

const NeonOverride neon_overrides[] = {
	OVERRIDE(mdcreate, neon_create, NEON_CREATE),
	OVERRIDE(mdexists, neon_exists, NEON_EXISTS),
	OVERRIDE(mdunlink, neon_unlink, NEON_UNLINK),
	OVERRIDE(mdextend, neon_extend, NEON_EXTEND),
	OVERRIDE(mdprefetch, neon_prefetch, NEON_PREFETCH),
#if NEON_VECTORED
	OVERRIDE(mdreadv, neon_readv, NEON_READ),
	OVERRIDE(mdwritev, neon_writev, NEON_WRITE),
#else
	OVERRIDE(mdread, neon_read, NEON_READ),
	OVERRIDE(mdwrite, neon_write, NEON_WRITE),
#endif
	OVERRIDE(mdnblocks, neon_nblocks, NEON_NBLOCKS),
	OVERRIDE(mdtruncate, neon_truncate, NEON_TRUNCATE),
#if PG_VERSION_NUM >= 160000
	OVERRIDE(mdzeroextend, neon_zeroextend, NEON_ZEROEXTEND),
#endif
};
const int	neon_overrides_count = lengthof(neon_overrides);
