/*
 * pgcompat.h
 *		What differs between the majors that this library is verified with.
 *
 * The storage manager's table is private to the server: its layout was checked
 * for these majors only, so all others are refused here and not at run time.
 */
#ifndef NEON_PGCOMPAT_H
#define NEON_PGCOMPAT_H

#include "postgres.h"

#include "common/relpath.h"
#include "storage/block.h"
#include "storage/latch.h"
#include "storage/smgr.h"

#if PG_VERSION_NUM < 150000 || PG_VERSION_NUM >= 180000
#error "the storage manager table of this Postgres major version has not been verified"
#endif

#if PG_VERSION_NUM >= 160000
typedef RelFileLocatorBackend NeonRelFile;
typedef const void *NeonWriteBuffer;
typedef void *NeonReadBuffer;
#define NeonRelFileOf(reln)		((reln)->smgr_rlocator)
#define NeonSpcOid(file)		((file).locator.spcOid)
#define NeonDbOid(file)			((file).locator.dbOid)
#define NeonRelNumber(file)		((file).locator.relNumber)
#define NeonIsTemp(file)		RelFileLocatorBackendIsTemp(file)
#else
typedef RelFileNodeBackend NeonRelFile;
typedef char *NeonWriteBuffer;
typedef char *NeonReadBuffer;
#define NeonRelFileOf(reln)		((reln)->smgr_rnode)
#define NeonSpcOid(file)		((file).node.spcNode)
#define NeonDbOid(file)			((file).node.dbNode)
#define NeonRelNumber(file)		((file).node.relNode)
#define NeonIsTemp(file)		RelFileNodeBackendIsTemp(file)
#endif

/* md.c moved to vectored calls in 17 */
#define NEON_VECTORED	(PG_VERSION_NUM >= 170000)

#if PG_VERSION_NUM >= 170000
#define NEON_NO_BACKEND			INVALID_PROC_NUMBER
#define neon_create_wait_set(n) CreateWaitEventSet(NULL, (n))
#else
#define NEON_NO_BACKEND			InvalidBackendId
#define neon_create_wait_set(n) CreateWaitEventSet(TopMemoryContext, (n))
#endif

#endif							/* NEON_PGCOMPAT_H */
