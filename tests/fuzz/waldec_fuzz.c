/*
 * Fuzzing of the WAL decoder and the record scanner.
 *
 * One input: u64 start LSN, u8 log2 of the segment size, u8 flags, u16 seed of
 * the chunking, then WAL bytes.  Whatever the bytes are, nothing may be read or
 * written out of bounds (the sanitizers see to that), every row must describe
 * bytes that are there, and cutting the stream differently must change nothing.
 *
 * As a libFuzzer target: `make -C postgres_ext fuzz`.  With its own mutations,
 * bounded and repeatable, for the tests: `make -C postgres_ext sanitize`, then
 * waldec_fuzz SEED ITERATIONS CORPUS_FILE...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "waldec.h"

#define PREFIX 12
#define FLAG_VERIFY_CRC 1
#define MAX_INPUT (1 << 20)

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t random_state;

static uint32_t
next_random(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t) (random_state >> 16);
}

static void
require(int condition, const char *what)
{
	if (!condition)
	{
		(void) fprintf(stderr, "waldec_fuzz: %s\n", what);
		abort();
	}
}

typedef struct Outcome
{
	int			stop;
	uint64_t	position;
	uint64_t	record_end;
	uint64_t	nrecords;
	uint64_t	nrefs;
	uint64_t	records_digest; /* apart, because a batch gives all records before all refs */
	uint64_t	refs_digest;
} Outcome;

static void
digest(uint64_t *state, const void *bytes, size_t len)
{
	const uint8_t *p = bytes;

	for (size_t i = 0; i < len; i++)
		*state = (*state ^ p[i]) * UINT64_C(0x100000001B3);
}

static void
check_record(const RecRow *row, const uint8_t *blob, const WalDecResult *result, Outcome *outcome)
{
	uint64_t	end_lsn;

	require((uint64_t) row->blob_off + 8 + row->tot_len <= result->blob_len, "a record outside of the blob");
	require(row->blob_off % 8 == 0, "a record that is not aligned");
	require((uint64_t) row->main_off + row->main_len == row->tot_len, "main data that does not end its record");
	require((uint64_t) row->first_ref + row->nref <= result->nrefs, "refs outside of the array");
	require(row->start_lsn < row->end_lsn && row->end_lsn % 8 == 0, "a record that ends before it starts");
	memcpy(&end_lsn, blob + row->blob_off, sizeof(end_lsn));
	require(end_lsn == row->end_lsn, "an entry with another LSN than its row");
	digest(&outcome->records_digest, blob + row->blob_off, 8 + (size_t) row->tot_len);
	outcome->records_digest ^= row->xid ^ row->rmid ^ row->info ^ row->toplevel_xid ^ row->main_len ^ row->nref ^ row->start_lsn;
}

static void
check_refs(const RefRow *refs, const WalDecResult *result, Outcome *outcome)
{
	for (uint64_t i = 0; i < result->nrefs; i++)
	{
		require(refs[i].rec < result->nrecords, "a ref to no record");
		require(refs[i].fork < 16, "a fork that does not fit its bits");
		digest(&outcome->refs_digest, &refs[i].spc, 4 * sizeof(uint32_t));
		outcome->refs_digest ^= refs[i].flags ^ ((uint64_t) refs[i].block_id << 8) ^ ((uint64_t) refs[i].fork << 16);
	}
}

static void
take_batch(WalDec *dec, Outcome *outcome)
{
	WalDecResult result;
	const RecRow *records;
	const uint8_t *blob;

	waldec_result(dec, &result);
	records = (const RecRow *) (uintptr_t) result.records;
	blob = (const uint8_t *) (uintptr_t) result.blob;
	for (uint64_t i = 0; i < result.nrecords; i++)
		check_record(&records[i], blob, &result, outcome);
	check_refs((const RefRow *) (uintptr_t) result.refs, &result, outcome);
	outcome->nrecords += result.nrecords;
	outcome->nrefs += result.nrefs;
	outcome->record_end = result.record_end;
	waldec_consume(dec);
}

static size_t
chunk_size(size_t left)
{
	static const size_t sizes[] = {1, 3, 8, 24, 25, 100, 1000, 8191, 8192, 8193, 65536};
	size_t		size = sizes[next_random() % (sizeof(sizes) / sizeof(sizes[0]))];

	return size < left ? size : left;
}

/* Each chunk is copied to memory of just its size, so that reading past it is seen. */
static uint8_t *
exact_copy(const uint8_t *data, size_t len)
{
	uint8_t    *copy = malloc(len);

	require(copy != NULL, "out of memory");
	memcpy(copy, data, len);
	return copy;
}

static Outcome
decode(const uint8_t *prefix, const uint8_t *data, size_t size, int whole)
{
	Outcome		outcome = {0};
	uint64_t	lsn;
	WalDec	   *dec;

	memcpy(&lsn, prefix, sizeof(lsn));
	lsn &= UINT64_C(0x0000FFFFFFFFFFFF);
	outcome.records_digest = outcome.refs_digest = UINT64_C(0xCBF29CE484222325);
	dec = waldec_new(lsn, UINT32_C(1) << (13 + prefix[8] % 18), prefix[9] & FLAG_VERIFY_CRC);
	require(dec != NULL, "out of memory");
	for (size_t at = 0; at < size && outcome.stop == 0;)
	{
		size_t		len = whole ? size : chunk_size(size - at);
		uint8_t    *copy = exact_copy(data + at, len);

		outcome.stop = waldec_feed(dec, copy, len);
		free(copy);
		take_batch(dec, &outcome);
		at += len;
	}
	require((outcome.stop != 0) == (waldec_error(dec)[0] != '\0'), "an error without text, or text without error");
	waldec_free(dec);
	return outcome;
}

static void
scan(const uint8_t *prefix, const uint8_t *data, size_t size)
{
	uint64_t	lsn;
	WalStream  *stream;

	memcpy(&lsn, prefix, sizeof(lsn));
	lsn &= UINT64_C(0x0000FFFFFFFFFFFF);
	stream = walscan_new(lsn, UINT32_C(1) << (13 + prefix[8] % 18));
	require(stream != NULL, "out of memory");
	for (size_t at = 0; at < size;)
	{
		size_t		len = chunk_size(size - at);
		uint8_t    *copy = exact_copy(data + at, len);
		int			stop = walscan_feed(stream, copy, len);

		free(copy);
		at += len;
		require(stream->record_end_lsn <= stream->position, "a record end that has not been consumed");
		if (stop != 0)
			break;
	}
	walscan_free(stream);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint16_t	seed;
	Outcome		whole;
	Outcome		chunks;

	if (size < PREFIX || size > MAX_INPUT)
		return 0;
	memcpy(&seed, data + 10, sizeof(seed));
	random_state = UINT64_C(0x9E3779B97F4A7C15) + seed;
	whole = decode(data, data + PREFIX, size - PREFIX, 1);
	chunks = decode(data, data + PREFIX, size - PREFIX, 0);
	require(whole.stop == chunks.stop && whole.nrecords == chunks.nrecords && whole.nrefs == chunks.nrefs &&
			whole.record_end == chunks.record_end && whole.records_digest == chunks.records_digest &&
			whole.refs_digest == chunks.refs_digest, "chunking changes the result");
	scan(data, data + PREFIX, size - PREFIX);
	return 0;
}

#ifndef LIBFUZZER

static size_t
mutate(uint8_t *data, size_t size, uint64_t *state)
{
	uint64_t	saved = random_state;
	uint32_t	changes;

	random_state = *state;
	changes = next_random() % 6;
	for (uint32_t i = 0; i < changes && size > PREFIX + 8; i++)
	{
		size_t		at = PREFIX + next_random() % (size - PREFIX - 4);
		uint32_t	word = next_random();

		/* headers are where structure is: prefer the beginnings of pages */
		if (word % 4 == 0)
			at = PREFIX + (at - PREFIX) / 8192 * 8192 + word / 4 % 64 % (size - PREFIX - 4);
		switch (next_random() % 6)
		{
			case 0:
				data[at] ^= (uint8_t) (1 << word % 8);
				break;
			case 1:
				data[at] = (uint8_t) word;
				break;
			case 2:
				memcpy(data + at, &word, sizeof(word));
				break;
			case 3:
				memset(data + at, word % 2 ? 0 : 0xFF, 1 + word / 2 % 4);
				break;
			case 4:				/* cut */
				size = at;
				break;
			default:			/* move a piece over another */
				{
					size_t		from = PREFIX + word % (size - PREFIX - 4);
					size_t		most = size - (from > at ? from : at);

					memmove(data + at, data + from, next_random() % (most + 1));
				}
		}
	}
	data[9] = (uint8_t) (next_random() % 4 == 0 ? FLAG_VERIFY_CRC : 0);
	data[10] = (uint8_t) next_random();
	data[11] = (uint8_t) next_random();
	*state = random_state;
	random_state = saved;
	return size;
}

typedef struct CorpusFile
{
	uint8_t    *data;
	size_t		size;
} CorpusFile;

static CorpusFile
load(const char *path)
{
	CorpusFile	loaded = {malloc(MAX_INPUT), 0};
	FILE	   *file = fopen(path, "rb");

	require(loaded.data != NULL && file != NULL, "cannot load the corpus");
	loaded.size = fread(loaded.data, 1, MAX_INPUT, file);
	(void) fclose(file);
	require(loaded.size > PREFIX + 8, "a corpus file that is too short");
	return loaded;
}

int
main(int argc, char **argv)
{
	uint64_t	state;
	unsigned long iterations;
	static uint8_t work[MAX_INPUT];
	int			nfiles = argc - 3;
	CorpusFile *corpus;

	if (nfiles < 1)
	{
		(void) fprintf(stderr, "usage: waldec_fuzz SEED ITERATIONS CORPUS_FILE...\n");
		return 2;
	}
	state = strtoull(argv[1], NULL, 10) * 2 + 1;
	iterations = strtoul(argv[2], NULL, 10);
	corpus = calloc((size_t) nfiles, sizeof(CorpusFile));
	require(corpus != NULL, "out of memory");
	for (int i = 0; i < nfiles; i++)
		corpus[i] = load(argv[3 + i]);
	for (unsigned long i = 0; i < iterations; i++)
	{
		const CorpusFile *file = &corpus[i % (unsigned long) nfiles];

		memcpy(work, file->data, file->size);
		LLVMFuzzerTestOneInput(work, i < (unsigned long) nfiles ? file->size : mutate(work, file->size, &state));
	}
	for (int i = 0; i < nfiles; i++)
		free(corpus[i].data);
	free(corpus);
	(void) printf("%lu inputs\n", iterations);
	return 0;
}

#endif
