/*
 * Fuzzing of the lanes: lane_fuzz SEED ITERATIONS CORPUS_FILE...
 *
 * The corpus is that of waldec_fuzz.c.  Each input is one of four things:
 *
 * - appends cut out of a corpus file, given to append_lane_take() in memory of just their size (appends.c);
 * - the same through a socket and the event loop, with the answers read at the other end (appends.c);
 * - a proposer's lanes between a Postgres and three to five safekeepers, all played here, Python's part as well (proposer.c);
 * - the quorum's position for random voters (quorum.c); and whether a wait ends in time while a lane is busy (wait.c).
 *
 * Whatever comes, nothing may be read or written out of bounds (the sanitizers see to that), and a lane must take exactly what
 * a plain model of it says: too little would go unnoticed otherwise, as all that a lane leaves is done by Python.  Nor may
 * anything of what the lanes do never happen in a long run: this is checked here.
 *
 * An input depends on nothing but the seed and its number: the clock is ours too (support.c).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lane_fuzz.h"

#define PREFIX 12				/* of a corpus file: u64 start LSN, u8 log2 of the segment size above 13, and 3 bytes */
#define MAX_FILE (1 << 20)

static Wal
load(const char *path)
{
	Wal			wal = {0};
	uint8_t		prefix[PREFIX];
	FILE	   *file = fopen(path, "rb");
	WalStream  *scanner;

	require(file != NULL && fread(prefix, 1, PREFIX, file) == PREFIX, "cannot load the corpus");
	memcpy(&wal.start_lsn, prefix, sizeof(wal.start_lsn));
	wal.segment_size = UINT32_C(1) << (13 + prefix[8] % 18);
	wal.bytes = allocate(MAX_FILE);
	wal.size = fread(wal.bytes, 1, MAX_FILE, file);
	(void) fclose(file);

	/* what comes behind its end is not WAL */
	scanner = walscan_new(wal.start_lsn, wal.segment_size);
	require(scanner != NULL, "out of memory");
	for (size_t at = 0; at < wal.size; at += 64)
		if (walscan_feed(scanner, wal.bytes + at, wal.size - at < 64 ? wal.size - at : 64) != 0)
			wal.size = at;
	walscan_free(scanner);
	return wal;
}

int
main(int argc, char **argv)
{
	unsigned long iterations;
	int			nfiles = argc - 3;
	Wal		   *corpus;

	if (nfiles < 1)
	{
		(void) fprintf(stderr, "usage: lane_fuzz SEED ITERATIONS CORPUS_FILE...\n");
		return 2;
	}
	seed = strtoul(argv[1], NULL, 10);
	iterations = strtoul(argv[2], NULL, 10);
	corpus = calloc((size_t) nfiles, sizeof(Wal));
	require(corpus != NULL, "out of memory");
	for (int i = 0; i < nfiles; i++)
		corpus[i] = load(argv[3 + i]);
	for (input = 0; input < iterations; input++)
	{
		const Wal  *wal;

		random_state = (seed * 1000003 + input) * UINT64_C(0x9E3779B97F4A7C15) + 1;
		for (int i = 0; i < 8; i++)
			(void) next_random();
		wal = &corpus[below((size_t) nfiles)];
		switch (below(4))
		{
			case 0:
				fuzz_take(wal);
				break;
			case 1:
				fuzz_append_lane(wal);
				break;
			case 2:
				fuzz_proposer();
				break;
			default:
				fuzz_quorum();
				fuzz_wait();
		}
	}
	for (int i = 0; i < nfiles; i++)
		free(corpus[i].bytes);
	free(corpus);
	if (iterations >= 1000)
		require(seen.appends && seen.commits && seen.failed_writes && seen.not_wal && seen.answers_unsent && seen.wal_taken &&
				seen.answers_taken && seen.statuses && seen.sends_cut && seen.rings_round && seen.gathered &&
				seen.left_to_python,
				"something of what the lanes do never happened");
	(void) printf("%lu inputs\n", iterations);
	return 0;
}
