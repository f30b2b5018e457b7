/*
 * Errors of redo routines end one page, not the process: ereport(ERROR) by the
 * usual long jump, PANIC by our own abort(), which the server's binary calls
 * because this library is found first.
 */
#include "redo.h"

#include <setjmp.h>
#include <unistd.h>

#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/lwlock.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

static char message[1024];
static sigjmp_buf abort_jump;
static volatile sig_atomic_t guarded;

static void
capture(ErrorData *error)
{
	error->output_to_server = false;
	error->output_to_client = false;
	if (error->elevel >= ERROR)
		snprintf(message, sizeof(message), "%s: %s", error->elevel >= PANIC ? "PANIC" : "ERROR",
				 error->message ? error->message : "no text");
}

void
install_error_capture(void)
{
	emit_log_hook = capture;
}

void
abort(void)
{
	if (guarded)
	{
		guarded = 0;
		siglongjmp(abort_jump, 1);
	}
	_exit(134);
}

/* What AbortTransaction would do of it: locks, pins, memory, error state. */
static void
clean_up(void)
{
	ResourceOwner owner = CurrentResourceOwner;

	InterruptHoldoffCount = 0;
	QueryCancelHoldoffCount = 0;
	CritSectionCount = 0;
	LWLockReleaseAll();
#if PG_VERSION_NUM < 160000
	AbortBufferIO();			/* later, ResourceOwnerRelease does it */
#endif
	UnlockBuffers();
	ResourceOwnerRelease(owner, RESOURCE_RELEASE_BEFORE_LOCKS, false, true);
	ResourceOwnerRelease(owner, RESOURCE_RELEASE_LOCKS, false, true);
	ResourceOwnerRelease(owner, RESOURCE_RELEASE_AFTER_LOCKS, false, true);
	CurrentResourceOwner = NULL;
	ResourceOwnerDelete(owner); /* from 17 on, an owner cannot be used again after its release */
	CurrentResourceOwner = ResourceOwnerCreate(NULL, "wal redo");
	MemoryContextSwitchTo(TopMemoryContext);
	FlushErrorState();
	error_context_stack = NULL;
	forget_pages();
}

/* True, or false with the text of the error and everything cleaned up. */
bool
run_guarded(void (*work) (void *), void *argument, char *text, size_t text_size)
{
	sigjmp_buf	error_jump;

	message[0] = '\0';
	if (sigsetjmp(error_jump, 0) == 0 && sigsetjmp(abort_jump, 0) == 0)
	{
		PG_exception_stack = &error_jump;
		guarded = 1;
		work(argument);
		guarded = 0;
		PG_exception_stack = NULL;
		return true;
	}
	if (message[0] == '\0')
		EmitErrorReport();		/* through capture() */
	guarded = 0;
	PG_exception_stack = NULL;
	clean_up();
	snprintf(text, text_size, "%s", message[0] ? message : "ERROR: no text");
	return false;
}
