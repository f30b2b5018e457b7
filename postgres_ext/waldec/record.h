/*
 * Inside one WAL record: its header, its block references, and the visibility
 * map pages that its redo changes without referencing them.
 */
#ifndef NEON_WALDEC_RECORD_H
#define NEON_WALDEC_RECORD_H

#include <stdbool.h>

#include "waldec.h"

/* at most every block id, plus the map pages of an update's two heap blocks */
#define MAX_REFS_PER_RECORD (33 + 2)

typedef struct ParsedRecord
{
	uint32_t	main_off;
	uint32_t	main_len;
	uint32_t	toplevel_xid;
	uint32_t	nrefs;
	RefRow		refs[MAX_REFS_PER_RECORD];	/* end_lsn, rec and rmid are left to the caller */
} ParsedRecord;

/* NULL, or what is wrong with the record. */
extern const char *parse_record(const uint8_t *raw, uint32_t len, ParsedRecord *parsed);

#endif
