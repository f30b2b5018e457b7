/*
 * Frames on stdin and stdout.  A request frame is read whole before any of it
 * is worked on; answers have a fixed stride.  A frame that breaks the protocol
 * ends the process: the service starts another.
 */
#include "redo.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define OUTPUT_SIZE (32 * sizeof(PageAnswer) + 4096)
#define MAX_FRAME (UINT32_C(1) << 30)

static char *input;
static size_t input_size;
static char *output;
static size_t output_len;

static void
read_fully(char *to, size_t len)
{
	while (len > 0)
	{
		ssize_t		n = read(STDIN_FILENO, to, len);

		if (n == 0)
			_exit(0);			/* the service is gone or wants no more */
		if (n < 0 && errno != EINTR)
			_exit(4);
		if (n > 0)
		{
			to += n;
			len -= (size_t) n;
		}
	}
}

static void
flush_output(void)
{
	const char *from = output;

	while (output_len > 0)
	{
		ssize_t		n = write(STDOUT_FILENO, from, output_len);

		if (n < 0 && errno != EINTR)
			_exit(4);
		if (n > 0)
		{
			from += n;
			output_len -= (size_t) n;
		}
	}
}

/* Room for an answer that is not larger than OUTPUT_SIZE. */
static void *
append_output(size_t len)
{
	if (output_len + len > OUTPUT_SIZE)
		flush_output();
	output_len += len;
	return output + output_len - len;
}

static void
append_header(uint32 op, uint32 n, size_t stride)
{
	FrameHeader *header = append_output(sizeof(FrameHeader));

	header->magic = FRAME_MAGIC;
	header->op = op;
	header->n = n;
	header->len = n * (uint32) stride;
}

static void
read_body(uint32 len)
{
	if (len > MAX_FRAME)
		die("neon_redo: frame of %u bytes", len);
	if (len > input_size)
	{
		free(input);
		input_size = TYPEALIGN(64, (size_t) len + len / 4);
		input = aligned_alloc(64, input_size);
		if (input == NULL)
			die("neon_redo: no memory for a frame of %u bytes", len);
	}
	read_fully(input, len);
}

typedef struct PageWork
{
	const PageRequest *request;
	const char *body;
	bool		verify;
	PageAnswer *answer;
} PageWork;

static void
do_page(void *argument)
{
	PageWork   *work = argument;

	redo_page(work->request, work->body, work->verify, work->answer);
}

static void
serve_pages(const FrameHeader *frame)
{
	size_t		at = 0;

	append_header(frame->op, frame->n, sizeof(PageAnswer));
	for (uint32 i = 0; i < frame->n; i++)
	{
		const PageRequest *request = (const PageRequest *) (input + at);
		PageWork	work;
		size_t		body_len;

		if (frame->len - at < sizeof(PageRequest))
			die("neon_redo: frame ends inside a request");
		at += sizeof(PageRequest);
		body_len = (request->has_base ? BLCKSZ : 0) + (size_t) request->entries_len;
		if (frame->len - at < body_len || request->entries_len % 8 != 0)
			die("neon_redo: request longer than its frame, or not aligned");
		work = (PageWork) {request, input + at, frame->op == OP_VERIFY, append_output(sizeof(PageAnswer))};
		if (!run_guarded(do_page, &work, work.answer->page, BLCKSZ))
			work.answer->status = PAGE_ERROR;
		at += body_len;
	}
	flush_output();
}

static void
serve_masks(const FrameHeader *frame)
{
	const MaskRequest *requests = (const MaskRequest *) input;

	if (frame->len != frame->n * sizeof(MaskRequest))
		die("neon_redo: mask frame of the wrong length");
	append_header(frame->op, frame->n, BLCKSZ);
	for (uint32 i = 0; i < frame->n; i++)
	{
		static char page[BLCKSZ] pg_attribute_aligned(64);

		memcpy(page, requests[i].page, BLCKSZ);
		mask_page(requests[i].rmid, requests[i].blk, page);
		memcpy(append_output(BLCKSZ), page, BLCKSZ);
	}
	flush_output();
}

void
serve_forever(void)
{
	output = malloc(OUTPUT_SIZE);
	if (output == NULL)
		die("neon_redo: out of memory");
	for (;;)
	{
		FrameHeader frame;

		read_fully((char *) &frame, sizeof(frame));
		if (frame.magic != FRAME_MAGIC)
			die("neon_redo: not a frame");
		read_body(frame.len);
		switch (frame.op)
		{
			case OP_REDO:
			case OP_VERIFY:
				serve_pages(&frame);
				break;
			case OP_MASK:
				serve_masks(&frame);
				break;
			case OP_PING:
				append_header(OP_PING, PG_VERSION_NUM, 0);
				flush_output();
				break;
			default:
				die("neon_redo: unknown operation %u", frame.op);
		}
	}
}
