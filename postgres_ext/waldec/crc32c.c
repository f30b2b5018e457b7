/*
 * CRC-32C: x86-64 with SSE 4.2, arm64 with the CRC extension, and a table for
 * every other processor.
 */
#include "crc32c.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

#define POLYNOMIAL UINT32_C(0x82F63B78) /* reflected */

static uint32_t table[256];
static bool hardware;

static uint32_t
extend_by_table(uint32_t crc, const uint8_t *data, size_t len)
{
	for (size_t i = 0; i < len; i++)
		crc = table[(crc ^ data[i]) & 0xFF] ^ (crc >> 8);
	return crc;
}

#if defined(__x86_64__)

static bool
processor_has_crc(void)
{
	return __builtin_cpu_supports("sse4.2") != 0;
}

__attribute__((target("sse4.2")))
static uint32_t
extend_by_instruction(uint32_t crc, const uint8_t *data, size_t len)
{
	uint64_t	wide = crc;

	for (; len >= 8; data += 8, len -= 8)
	{
		uint64_t	word;

		memcpy(&word, data, sizeof(word));
		wide = _mm_crc32_u64(wide, word);
	}
	crc = (uint32_t) wide;
	for (; len > 0; data++, len--)
		crc = _mm_crc32_u8(crc, *data);
	return crc;
}

#elif defined(__aarch64__) && defined(__linux__)

static bool
processor_has_crc(void)
{
	return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}

__attribute__((target("+crc")))
static uint32_t
extend_by_instruction(uint32_t crc, const uint8_t *data, size_t len)
{
	for (; len >= 8; data += 8, len -= 8)
	{
		uint64_t	word;

		memcpy(&word, data, sizeof(word));
		crc = __crc32cd(crc, word);
	}
	for (; len > 0; data++, len--)
		crc = __crc32cb(crc, *data);
	return crc;
}

#else

static bool
processor_has_crc(void)
{
	return false;
}

#define extend_by_instruction extend_by_table

#endif

/* Idempotent; concurrent first calls write the same values. */
void
crc32c_init(void)
{
	for (uint32_t i = 0; i < 256; i++)
	{
		uint32_t	crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ ((crc & 1) ? POLYNOMIAL : 0);
		table[i] = crc;
	}
	hardware = processor_has_crc();
}

uint32_t
crc32c_extend(uint32_t crc, const uint8_t *data, size_t len)
{
	return hardware ? extend_by_instruction(crc, data, len) : extend_by_table(crc, data, len);
}

/* For tests: the table's answer, whatever the processor can do. */
extern uint32_t crc32c_extend_by_table(uint32_t crc, const uint8_t *data, size_t len);

uint32_t
crc32c_extend_by_table(uint32_t crc, const uint8_t *data, size_t len)
{
	return extend_by_table(crc, data, len);
}
