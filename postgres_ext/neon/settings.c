/*
 * settings.c
 *		The GUCs of the prefix "neon".
 *
 * Those that mean something here are variables.  The others exist in Neon's own
 * extension and are accepted without effect, so that a specification or a
 * configuration written for Neon starts; the prefix is then reserved, so that a
 * misspelt name is reported.
 */
#include "neon.h"

#include <limits.h>

#include "utils/guc.h"

char	   *neon_tenant_id = NULL;
char	   *neon_timeline_id = NULL;
char	   *neon_pageserver_connstring = NULL;
int			neon_max_reconnect_attempts = 60;
int			neon_pageserver_retry_timeout = 60000;
int			neon_pageserver_response_log_timeout = 10000;
int			neon_pageserver_response_disconnect_timeout = 150000;
int			neon_readahead_buffer_size = 128;
int			neon_fill_delay = 1000;
bool		neon_regress_test_mode = false;

static bool
check_connstring(char **newval, void **extra, GucSource source)
{
	if (*newval == NULL)
		return true;
	if (strlen(*newval) >= NEON_CONNSTRING_SIZE)
	{
		GUC_check_errdetail("It is longer than %d bytes.", NEON_CONNSTRING_SIZE - 1);
		return false;
	}
	if (strchr(*newval, ',') != NULL)
	{
		GUC_check_errdetail("It lists several shards; sharded tenants are not supported.");
		return false;
	}
	return true;
}

static void
assign_connstring(const char *newval, void *extra)
{
	neon_publish_connstring(newval);
}

/* Accepted for compatibility, without effect. */
typedef struct AcceptedSetting
{
	const char *name;
	enum
	{
		ACCEPTED_BOOL, ACCEPTED_INT, ACCEPTED_STRING
	}			type;
	int			default_number;
	int			unit;			/* GUC_UNIT_..., so that values like '10s' are read */
	union
	{
		bool		boolean;
		int			integer;
		char	   *string;
	}			value;
} AcceptedSetting;

static AcceptedSetting accepted[] = {
	{.name = "neon.project_id",.type = ACCEPTED_STRING},
	{.name = "neon.branch_id",.type = ACCEPTED_STRING},
	{.name = "neon.endpoint_id",.type = ACCEPTED_STRING},
	{.name = "neon.compute_mode",.type = ACCEPTED_STRING},
	{.name = "neon.safekeepers",.type = ACCEPTED_STRING},
	{.name = "neon.safekeeper_conninfo_options",.type = ACCEPTED_STRING},
	{.name = "neon.file_cache_path",.type = ACCEPTED_STRING},
	{.name = "neon.running_xacts_overflow_policy",.type = ACCEPTED_STRING},
	{.name = "neon.privileged_role_name",.type = ACCEPTED_STRING},
	{.name = "neon.console_url",.type = ACCEPTED_STRING},
	{.name = "neon.unstable_extensions",.type = ACCEPTED_STRING},
	{.name = "neon.debug_compare_local",.type = ACCEPTED_STRING},
	{.name = "neon.safekeeper_proto_version",.type = ACCEPTED_INT,.default_number = 3},
	{.name = "neon.safekeeper_connect_timeout",.type = ACCEPTED_INT,.default_number = 10000,.unit = GUC_UNIT_MS},
	{.name = "neon.safekeeper_reconnect_timeout",.type = ACCEPTED_INT,.default_number = 1000,.unit = GUC_UNIT_MS},
	{.name = "neon.stripe_size",.type = ACCEPTED_INT,.default_number = 2048,.unit = GUC_UNIT_BLOCKS},
	{.name = "neon.protocol_version",.type = ACCEPTED_INT,.default_number = 3},
	{.name = "neon.flush_output_after",.type = ACCEPTED_INT,.default_number = 8},
	{.name = "neon.readahead_getpage_pull_timeout",.type = ACCEPTED_INT,.default_number = 50,.unit = GUC_UNIT_MS},
	{.name = "neon.max_cluster_size",.type = ACCEPTED_INT,.default_number = -1,.unit = GUC_UNIT_MB},
	{.name = "neon.max_file_cache_size",.type = ACCEPTED_INT,.unit = GUC_UNIT_MB},
	{.name = "neon.file_cache_size_limit",.type = ACCEPTED_INT,.unit = GUC_UNIT_MB},
	{.name = "neon.file_cache_chunk_size",.type = ACCEPTED_INT,.default_number = 128,.unit = GUC_UNIT_BLOCKS},
	{.name = "neon.file_cache_prewarm_limit",.type = ACCEPTED_INT,.default_number = INT_MAX},
	{.name = "neon.file_cache_prewarm_batch",.type = ACCEPTED_INT,.default_number = 64},
	{.name = "neon.last_written_lsn_cache_size",.type = ACCEPTED_INT,.default_number = 131072},
	{.name = "neon.relsize_hash_size",.type = ACCEPTED_INT,.default_number = 65536},
	{.name = "neon.extension_server_port",.type = ACCEPTED_INT},
	{.name = "neon.extension_server_request_timeout",.type = ACCEPTED_INT,.default_number = 60,.unit = GUC_UNIT_S},
	{.name = "neon.extension_server_connect_timeout",.type = ACCEPTED_INT,.default_number = 60,.unit = GUC_UNIT_S},
	{.name = "neon.logical_replication_max_snap_files",.type = ACCEPTED_INT,.default_number = 10000},
	{.name = "neon.logical_replication_max_logicalsnapdir_size",.type = ACCEPTED_INT,.default_number = 8000,.unit = GUC_UNIT_KB},
	{.name = "neon.pgstat_file_size_limit",.type = ACCEPTED_INT,.unit = GUC_UNIT_KB},
	{.name = "neon.max_replication_write_lag",.type = ACCEPTED_INT,.default_number = -1,.unit = GUC_UNIT_MB},
	{.name = "neon.max_replication_flush_lag",.type = ACCEPTED_INT,.default_number = -1,.unit = GUC_UNIT_MB},
	{.name = "neon.max_replication_apply_lag",.type = ACCEPTED_INT,.default_number = -1,.unit = GUC_UNIT_MB},
	{.name = "neon.lsn_cache_size",.type = ACCEPTED_INT,.default_number = 131072},
	{.name = "neon.seqscan_prefetch_buffers",.type = ACCEPTED_INT,.default_number = 10},
	{.name = "neon.enable_seqscan_prefetch",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.enable_indexscan_prefetch",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.enable_indexonlyscan_prefetch",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.store_prefetch_result_in_lfc",.type = ACCEPTED_BOOL},
	{.name = "neon.prewarm_update_ws_estimation",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.disable_logical_replication_subscribers",.type = ACCEPTED_BOOL},
	{.name = "neon.disable_wal_prevlink_checks",.type = ACCEPTED_BOOL},
	{.name = "neon.allow_replica_misconfig",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.monitor_query_exec_time",.type = ACCEPTED_BOOL},
	{.name = "neon.forward_ddl",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.event_triggers",.type = ACCEPTED_BOOL,.default_number = 1},
	{.name = "neon.allow_unstable_extensions",.type = ACCEPTED_BOOL},
	{.name = "neon.lakebase_mode",.type = ACCEPTED_BOOL},
};

static void
define_accepted(AcceptedSetting *setting)
{
	const char *description = "Accepted for compatibility; it has no effect here.";

	switch (setting->type)
	{
		case ACCEPTED_BOOL:
			DefineCustomBoolVariable(setting->name, description, NULL, &setting->value.boolean,
									 setting->default_number != 0, PGC_USERSET, 0, NULL, NULL, NULL);
			break;
		case ACCEPTED_INT:
			DefineCustomIntVariable(setting->name, description, NULL, &setting->value.integer,
									setting->default_number, -1, INT_MAX, PGC_USERSET, setting->unit, NULL, NULL, NULL);
			break;
		case ACCEPTED_STRING:
			DefineCustomStringVariable(setting->name, description, NULL, &setting->value.string,
									   "", PGC_USERSET, 0, NULL, NULL, NULL);
			break;
	}
}

void
neon_define_settings(void)
{
	DefineCustomStringVariable("neon.tenant_id", "Tenant whose timeline this compute runs on.", NULL,
							   &neon_tenant_id, "", PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("neon.timeline_id", "Timeline that this compute runs on.", NULL,
							   &neon_timeline_id, "", PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("neon.pageserver_connstring", "Connection string of the pageserver.", NULL,
							   &neon_pageserver_connstring, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY,
							   check_connstring, assign_connstring, NULL);
	DefineCustomIntVariable("neon.max_reconnect_attempts",
							"Failed attempts to get a page before the read fails.", NULL,
							&neon_max_reconnect_attempts, 60, 0, INT_MAX, PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("neon.pageserver_retry_timeout",
							"Time to retry an unreachable pageserver before the read fails.", NULL,
							&neon_pageserver_retry_timeout, 60000, 0, INT_MAX, PGC_USERSET, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("neon.pageserver_response_log_timeout",
							"Time without an answer from the pageserver after which it is logged.", NULL,
							&neon_pageserver_response_log_timeout, 10000, -1, INT_MAX, PGC_USERSET, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("neon.pageserver_response_disconnect_timeout",
							"Time without an answer from the pageserver after which the connection is made anew.", NULL,
							&neon_pageserver_response_disconnect_timeout, 150000, -1, INT_MAX, PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("neon.readahead_buffer_size",
							"Largest number of blocks that a process reads ahead.", NULL,
							&neon_readahead_buffer_size, 128, 16, 1024, PGC_USERSET, GUC_UNIT_BLOCKS, NULL, NULL, NULL);
	DefineCustomIntVariable("neon.fill_delay",
							"Delay before the files of unread relations are made in the background; -1 for never.", NULL,
							&neon_fill_delay, 1000, -1, INT_MAX, PGC_POSTMASTER, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomBoolVariable("neon.regress_test_mode",
							 "Allow what the regression tests need and the storage does not keep, such as tablespaces.", NULL,
							 &neon_regress_test_mode, false, PGC_SUSET, 0, NULL, NULL, NULL);
	for (size_t i = 0; i < lengthof(accepted); i++)
		define_accepted(&accepted[i]);
	MarkGUCPrefixReserved("neon");
}
