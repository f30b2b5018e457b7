/*
 * libneon_waldec: what the shared library offers, and the rows it produces.
 *
 * Only the server's headers are used, no symbol of the server, so the same
 * objects are loaded by services and linked into the redo helper.
 */
#ifndef NEON_WALDEC_H
#define NEON_WALDEC_H

#include <stddef.h>
#include <stdint.h>

#include "walstream.h"

/* One WAL record, 48 bytes. */
typedef struct RecRow
{
	uint64_t	start_lsn;
	uint64_t	end_lsn;		/* EndRecPtr: the LSN that redo gives to pages */
	uint32_t	blob_off;		/* of [u64 end_lsn][raw record][pad to 8] in the blob */
	uint32_t	tot_len;		/* xl_tot_len */
	uint32_t	xid;
	uint32_t	main_off;		/* main data, relative to the raw record */
	uint32_t	main_len;
	uint32_t	first_ref;		/* index of its first RefRow */
	uint16_t	nref;
	uint8_t		rmid;
	uint8_t		info;
	uint32_t	toplevel_xid;	/* XLR_BLOCK_ID_TOPLEVEL_XID, else 0 */
} RecRow;

/* One block that a record touches, 32 bytes. */
typedef struct RefRow
{
	uint64_t	end_lsn;
	uint32_t	rec;			/* index of its RecRow */
	uint32_t	spc;
	uint32_t	db;
	uint32_t	rel;
	uint32_t	blk;
	uint8_t		fork;
	uint8_t		flags;			/* REF_* */
	uint8_t		block_id;		/* REF_IMPLIED_BLOCK_ID when there is none */
	uint8_t		rmid;
} RefRow;

#define REF_WILL_INIT	1		/* redo makes the page from nothing */
#define REF_FPI			2		/* full-page image that redo applies */
#define REF_IMAGE		4		/* any image, also one only for consistency checking */
#define REF_DATA		8
#define REF_IMPLIED_VM	16		/* visibility map page that redo changes without naming it */

#define REF_IMPLIED_BLOCK_ID 255

/* What waldec_result() gives. */
typedef struct WalDecResult
{
	uint64_t	records;		/* address of RecRow[] */
	uint64_t	nrecords;
	uint64_t	refs;			/* address of RefRow[] */
	uint64_t	nrefs;
	uint64_t	blob;			/* address */
	uint64_t	blob_len;		/* of complete records */
	uint64_t	position;		/* LSN of the next input byte */
	uint64_t	record_end;		/* end LSN of the last complete record, or the start LSN */
} WalDecResult;

typedef struct WalDec WalDec;

extern WalDec *waldec_new(uint64_t start_lsn, uint32_t segment_size, int verify_crc);
extern void waldec_free(WalDec *dec);
extern int	waldec_feed(WalDec *dec, const uint8_t *data, size_t len);
extern void waldec_result(const WalDec *dec, WalDecResult *result);
extern void waldec_consume(WalDec *dec);
extern const char *waldec_error(const WalDec *dec);
extern int	waldec_pg_version_num(void);

extern WalStream *walscan_new(uint64_t start_lsn, uint32_t segment_size);
extern void walscan_free(WalStream *stream);
extern int	walscan_feed(WalStream *stream, const uint8_t *data, size_t len);
extern const char *walscan_error(const WalStream *stream);

#endif
