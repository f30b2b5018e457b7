/*
 * utility.c
 *		Refuse statements that copy relation files behind the storage manager, or
 *		put data where the storage does not keep it.
 */
#include "neon.h"

#include "commands/defrem.h"
#include "nodes/parsenodes.h"
#include "tcop/utility.h"

static ProcessUtility_hook_type previous_process_utility = NULL;

static void
refuse(const char *statement, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("%s is not supported by this compute", statement),
			 errhint("%s", hint)));
}

static void
check_createdb(const CreatedbStmt *statement)
{
	ListCell   *cell;

	foreach(cell, statement->options)
	{
		DefElem    *option = lfirst_node(DefElem, cell);

		/* it copies files, which have holes where blocks are absent */
		if (strcmp(option->defname, "strategy") == 0 && option->arg != NULL &&
			pg_strcasecmp(defGetString(option), "file_copy") == 0)
			refuse("CREATE DATABASE with strategy \"file_copy\"", "Use strategy \"wal_log\".");
	}
}

static void
check_alterdb(const AlterDatabaseStmt *statement)
{
	ListCell   *cell;

	foreach(cell, statement->options)
		if (strcmp(lfirst_node(DefElem, cell)->defname, "tablespace") == 0)
			refuse("ALTER DATABASE SET TABLESPACE", "Data of a compute lives in the storage, not in directories.");
}

static void
neon_process_utility(PlannedStmt *pstmt, const char *query, bool read_only_tree, ProcessUtilityContext context,
					 ParamListInfo params, QueryEnvironment *environment, DestReceiver *dest, QueryCompletion *completion)
{
	Node	   *statement = pstmt->utilityStmt;

	if (IsA(statement, CreatedbStmt))
		check_createdb((CreatedbStmt *) statement);
	else if (IsA(statement, AlterDatabaseStmt))
		check_alterdb((AlterDatabaseStmt *) statement);
	else if (IsA(statement, CreateTableSpaceStmt) && !neon_regress_test_mode)
		refuse("CREATE TABLESPACE", "Data of a compute lives in the storage, not in directories.");
	if (previous_process_utility)
		previous_process_utility(pstmt, query, read_only_tree, context, params, environment, dest, completion);
	else
		standard_ProcessUtility(pstmt, query, read_only_tree, context, params, environment, dest, completion);
}

void
neon_install_utility_hook(void)
{
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = neon_process_utility;
}
