/*
 * CRC-32C (Castagnoli), the checksum of WAL records.
 *
 * crc32c_extend() continues a running value; start from CRC32C_START and
 * finish with crc32c_finish().  The processor's instruction is used where it
 * has one (looked up once, by crc32c_init()), else a table.
 */
#ifndef NEON_CRC32C_H
#define NEON_CRC32C_H

#include <stddef.h>
#include <stdint.h>

#define CRC32C_START UINT32_C(0xFFFFFFFF)

extern void crc32c_init(void);
extern uint32_t crc32c_extend(uint32_t crc, const uint8_t *data, size_t len);

static inline uint32_t
crc32c_finish(uint32_t crc)
{
	return crc ^ UINT32_C(0xFFFFFFFF);
}

#endif
