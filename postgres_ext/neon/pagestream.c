/*
 * pagestream.c
 *		One connection to the pageserver, protocol pagestream_v3 over libpq.
 *
 * Nothing here blocks without the process latch, so cancel, statement_timeout
 * and termination work during every wait.  All state is static and consistent
 * whenever CHECK_FOR_INTERRUPTS() is called: an error may leave at any wait and
 * the next call goes on, or starts over with a new connection.
 */
#include "neon.h"

#include "libpq-fe.h"
#include "miscadmin.h"
#include "port/pg_bswap.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define CONNECT_TIMEOUT_MS	10000
#define TAG_GETPAGE			2
#define TAG_PAGE			102
#define TAG_ERROR			103
#define REQUEST_SIZE		(1 + 3 * 8 + 4 * 3 + 1 + 4)
#define RESPONSE_HEADER		REQUEST_SIZE
#define ERROR_HEADER		(1 + 3 * 8)

static PGconn *connection = NULL;
static bool streaming = false;	/* the connection is in COPY BOTH mode */
static bool unsent = false;		/* libpq holds bytes that the socket did not take */
static uint64 connstring_generation;
static char *received = NULL;	/* libpq's buffer of the last response */
static WaitEventSet *wait_set = NULL;
static struct Latch *wait_latch = NULL;
static int	socket_event;
static char last_error[512] = "not connected yet";
static char peer[256] = "";

const char *
neon_pagestream_error(void)
{
	return last_error;
}

const char *
neon_pagestream_peer(void)
{
	return peer;
}

bool
neon_pagestream_connected(void)
{
	return streaming;
}

static void
set_error(const char *what, const char *why)
{
	size_t		length;

	snprintf(last_error, sizeof(last_error), "%s: %s", what, why);
	for (length = strlen(last_error); length > 0 && last_error[length - 1] == '\n'; length--)
		last_error[length - 1] = '\0';
}

void
neon_pagestream_disconnect(void)
{
	if (wait_set != NULL)
		FreeWaitEventSet(wait_set);
	wait_set = NULL;
	if (received != NULL)
		PQfreemem(received);
	received = NULL;
	if (connection != NULL)
	{
		PQfinish(connection);
		ReleaseExternalFD();
	}
	connection = NULL;
	streaming = unsent = false;
}

static bool
fail(const char *what, const char *why)
{
	set_error(what, why);
	neon_pagestream_disconnect();
	return false;
}

static bool
fail_libpq(const char *what)
{
	return fail(what, PQerrorMessage(connection));
}

/* Wait for the socket or the deadline; errors of the backend leave from here. */
static void
wait_while_connecting(int socket_events, TimestampTz deadline)
{
	long		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline);
	int			events = WaitLatchOrSocket(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH | socket_events,
										   PQsocket(connection), left, PG_WAIT_EXTENSION);

	if (events & WL_LATCH_SET)
		ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

static bool
start_connection(void)
{
	char		connstring[NEON_CONNSTRING_SIZE];
	char		options[256];
	const char *token = getenv("NEON_AUTH_TOKEN");
	const char *keywords[] = {"dbname", "application_name", "options", "gssencmode", "keepalives_idle",
	"keepalives_interval", "keepalives_count", "password", NULL};
	const char *values[] = {connstring, "neon", options, "disable", "10", "5", "3", token, NULL};

	connstring_generation = neon_copy_connstring(connstring);
	if (connstring[0] == '\0')
	{
		set_error("no pageserver", "setting \"neon.pageserver_connstring\" is empty");
		return false;
	}
	if (token == NULL)
		keywords[lengthof(keywords) - 2] = NULL;
	snprintf(options, sizeof(options), "-c neon.compute_mode=primary -c tenant_id=%s -c timeline_id=%s",
			 neon_tenant_id, neon_timeline_id);
	if (!AcquireExternalFD())
	{
		set_error("could not connect", "too many open files");
		return false;
	}
	connection = PQconnectStartParams(keywords, values, 1);
	if (connection == NULL)
	{
		ReleaseExternalFD();
		set_error("could not connect", "out of memory");
		return false;
	}
	if (PQstatus(connection) == CONNECTION_BAD)
		return fail_libpq("could not connect");
	snprintf(peer, sizeof(peer), "%s:%s", PQhost(connection) ? PQhost(connection) : "?",
			 PQport(connection) ? PQport(connection) : "?");
	return true;
}

static bool
start_stream(TimestampTz deadline)
{
	char		command[128];
	PGresult   *result;
	ExecStatusType status;

	if (PQsetnonblocking(connection, 1) != 0)
		return fail_libpq("could not connect");
	snprintf(command, sizeof(command), "pagestream_v3 %s %s", neon_tenant_id, neon_timeline_id);
	if (!PQsendQuery(connection, command))
		return fail_libpq("could not start the page stream");
	while (PQflush(connection) == 1 || PQisBusy(connection))
	{
		if (GetCurrentTimestamp() >= deadline)
			return fail("could not start the page stream", "no answer in time");
		wait_while_connecting(WL_SOCKET_READABLE, deadline);
		if (!PQconsumeInput(connection))
			return fail_libpq("could not start the page stream");
	}
	result = PQgetResult(connection);
	status = PQresultStatus(result);
	if (status != PGRES_COPY_BOTH)
	{
		set_error("the pageserver refused the page stream",
				  result ? PQresultErrorMessage(result) : PQerrorMessage(connection));
		PQclear(result);
		neon_pagestream_disconnect();
		return false;
	}
	PQclear(result);
	return true;
}

static void
make_wait_set(void)
{
	if (wait_set != NULL)
		FreeWaitEventSet(wait_set);
	wait_set = neon_create_wait_set(3);
	wait_latch = MyLatch;
	AddWaitEventToSet(wait_set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	if (IsUnderPostmaster)
		AddWaitEventToSet(wait_set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	socket_event = AddWaitEventToSet(wait_set, WL_SOCKET_READABLE, PQsocket(connection), NULL, NULL);
}

/* Connect and start the stream.  False with neon_pagestream_error() when the pageserver cannot be reached. */
bool
neon_pagestream_connect(void)
{
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), CONNECT_TIMEOUT_MS);
	PostgresPollingStatusType polled = PGRES_POLLING_WRITING;

	neon_pagestream_disconnect();	/* also what an interrupted attempt has left */
	if (!start_connection())
		return false;
	while (polled != PGRES_POLLING_OK)
	{
		if (polled == PGRES_POLLING_FAILED)
			return fail_libpq("could not connect");
		if (GetCurrentTimestamp() >= deadline)
			return fail("could not connect", "no answer in time");
		wait_while_connecting(polled == PGRES_POLLING_READING ? WL_SOCKET_READABLE : WL_SOCKET_WRITEABLE, deadline);
		polled = PQconnectPoll(connection);
	}
	if (!start_stream(deadline))
		return false;
	make_wait_set();
	streaming = true;
	return true;
}

static char *
put32(char *at, uint32 value)
{
	value = pg_hton32(value);
	memcpy(at, &value, sizeof(value));
	return at + sizeof(value);
}

static char *
put64(char *at, uint64 value)
{
	value = pg_hton64(value);
	memcpy(at, &value, sizeof(value));
	return at + sizeof(value);
}

static uint32
get32(const char *at)
{
	uint32		value;

	memcpy(&value, at, sizeof(value));
	return pg_ntoh32(value);
}

static uint64
get64(const char *at)
{
	uint64		value;

	memcpy(&value, at, sizeof(value));
	return pg_ntoh64(value);
}

/* Queue a GetPage request for the block as of the base LSN; false when the connection is broken. */
bool
neon_pagestream_request(uint64 request_id, const NeonMapEntry *entry, BlockNumber block)
{
	char		request[REQUEST_SIZE];
	char	   *at = request;

	Assert(streaming);
	*at++ = TAG_GETPAGE;
	at = put64(at, request_id);
	at = put64(at, neon_map->base_lsn);
	at = put64(at, neon_map->base_lsn); /* nothing newer is ever wanted from there */
	at = put32(at, entry->spc);
	at = put32(at, entry->db);
	at = put32(at, entry->rel);
	*at++ = (char) entry->fork;
	at = put32(at, block);
	Assert(at == request + REQUEST_SIZE);
	if (PQputCopyData(connection, request, REQUEST_SIZE) != 1)
		return fail_libpq("lost the connection");
	unsent = true;
	return true;
}

bool
neon_pagestream_flush(void)
{
	int			left;

	if (!streaming)
		return false;
	left = PQflush(connection);
	if (left < 0)
		return fail_libpq("lost the connection");
	unsent = left > 0;
	return true;
}

static NeonReceived
broken(const char *what, const char *why)
{
	fail(what, why);
	return NEON_RECEIVED_BROKEN;
}

static NeonReceived
parse_response(int length, NeonPageResponse *response)
{
	const char *at = received;

	if (length >= ERROR_HEADER)
	{
		response->request_id = get64(at + 1);
		if (*at == TAG_ERROR && length > ERROR_HEADER && at[length - 1] == '\0')
		{
			response->error = at + ERROR_HEADER;
			return NEON_RECEIVED_RESPONSE;
		}
		if (*at == TAG_PAGE && length == RESPONSE_HEADER + BLCKSZ)
		{
			at += ERROR_HEADER;
			response->error = NULL;
			response->spc = get32(at);
			response->db = get32(at + 4);
			response->rel = get32(at + 8);
			response->fork = (uint8) at[12];
			response->block = get32(at + 13);
			response->page = received + RESPONSE_HEADER;
			return NEON_RECEIVED_RESPONSE;
		}
	}
	return broken("the pageserver broke the protocol", psprintf("response of type %d and %d bytes", (uint8) received[0], length));
}

/* The next response, if one is here; never waits. */
NeonReceived
neon_pagestream_receive(NeonPageResponse *response)
{
	int			length;

	if (!streaming)
		return NEON_RECEIVED_BROKEN;
	if (received != NULL)
		PQfreemem(received);
	received = NULL;
	length = PQgetCopyData(connection, &received, 1);
	if (length == 0)
	{
		if (!PQconsumeInput(connection))
			return broken("lost the connection", PQerrorMessage(connection));
		length = PQgetCopyData(connection, &received, 1);
		if (length == 0)
			return NEON_RECEIVED_NOTHING;
	}
	if (length == -1)
	{
		/* the stream was ended by the server, perhaps with an error that says why */
		PGresult   *result = PQgetResult(connection);

		set_error("the pageserver ended the page stream", result ? PQresultErrorMessage(result) : "");
		PQclear(result);
		neon_pagestream_disconnect();
		return NEON_RECEIVED_BROKEN;
	}
	if (length < 0)
		return broken("lost the connection", PQerrorMessage(connection));
	return parse_response(length, response);
}

/*
 * Wait until bytes have arrived, the process is wanted for something else, or
 * the time is over; then check for interrupts.
 */
void
neon_pagestream_wait(long timeout_ms)
{
	WaitEvent	event;

	if (!streaming)
		return;
	if (connstring_generation != neon_connstring_generation())
	{
		fail("the pageserver has moved", "setting \"neon.pageserver_connstring\" was changed");
		return;
	}
	if (wait_latch != MyLatch)
		make_wait_set();
	ModifyWaitEvent(wait_set, socket_event, WL_SOCKET_READABLE | (unsent ? WL_SOCKET_WRITEABLE : 0), NULL);
	if (WaitEventSetWait(wait_set, timeout_ms, &event, 1, PG_WAIT_EXTENSION) == 1)
	{
		if (event.events & WL_LATCH_SET)
			ResetLatch(MyLatch);
		if (event.events & WL_SOCKET_WRITEABLE)
			neon_pagestream_flush();
	}
	CHECK_FOR_INTERRUPTS();
}
