-- Everything whose WAL the pageserver must understand, small. Run with psql -v N=<rows>; errors are not expected.
\set VERBOSITY terse
\set ON_ERROR_STOP on
CREATE TABLE every_index (id bigserial PRIMARY KEY, k int, h text, list int[], words tsvector, place point, span int4range, at timestamptz, payload text);
CREATE INDEX ON every_index USING btree (k);
CREATE INDEX ON every_index USING hash (h);
CREATE INDEX ON every_index USING gin (list);
CREATE INDEX ON every_index USING gin (words) WITH (fastupdate = on, gin_pending_list_limit = 64);
CREATE INDEX ON every_index USING gist (place);
CREATE INDEX ON every_index USING gist (span);
CREATE INDEX ON every_index USING spgist (h);
CREATE INDEX ON every_index USING brin (at) WITH (pages_per_range = 2, autosummarize = on);
CREATE FUNCTION fill(n int, seed int) RETURNS void LANGUAGE sql AS $$
  INSERT INTO every_index (k, h, list, words, place, span, at, payload)
  SELECT g % 997, md5((g % 500)::text || seed), ARRAY[g % 100, g % 37, g * seed % 5000],
         to_tsvector('simple', md5(g::text) || ' ' || md5((g % 50)::text) || ' w' || (g % 13)),
         point(g * 7919 % 1000, g * 104729 % 1000), int4range(g % 1000, 1000 + g % 777),
         timestamptz '2024-01-01' + g * interval '1 s', repeat(md5(g::text || seed), 1 + g % 4)
  FROM generate_series(1, n) g $$;
SELECT fill(:N / 4, 1);
SELECT fill(:N / 4, 2);
CHECKPOINT;
SELECT fill(:N / 4, 3);

CREATE TABLE wide (id int PRIMARY KEY, big text, outside text);
ALTER TABLE wide ALTER COLUMN outside SET STORAGE EXTERNAL;
INSERT INTO wide SELECT g, (SELECT string_agg(md5(q::text || g), '') FROM generate_series(1, 200) q), repeat(md5(g::text), 150) FROM generate_series(1, :N / 40) g;
UPDATE wide SET outside = outside || 'x' WHERE id % 3 = 0;
DELETE FROM wide WHERE id % 5 = 0;

-- HOT updates, pruning, freezing, truncation by vacuum, and growth after that
CREATE TABLE hot (id int PRIMARY KEY, v int, filler text) WITH (fillfactor = 60);
INSERT INTO hot SELECT g, 0, repeat('a', 50) FROM generate_series(1, :N) g;
VACUUM hot;
UPDATE hot SET v = v + 1 WHERE id % 2 = 0;
UPDATE hot SET v = v + 1 WHERE id % 3 = 0;
SELECT count(*) FROM hot WHERE v > 0;
DELETE FROM hot WHERE id % 7 = 0;
VACUUM FREEZE hot;
UPDATE hot SET v = v - 1 WHERE id % 13 = 0;
DELETE FROM hot WHERE id > :N / 2;
VACUUM (TRUNCATE on) hot;
INSERT INTO hot SELECT g, 5, 'again' FROM generate_series(:N / 2 + 1, :N) g;
INSERT INTO hot SELECT g, 7, 'conflict' FROM generate_series(1, :N / 10) g ON CONFLICT (id) DO UPDATE SET v = excluded.v;
SELECT count(*) FROM (SELECT * FROM hot WHERE id % 48 = 0 FOR SHARE) locked;
VACUUM FREEZE hot;
SELECT count(*) FROM (SELECT * FROM hot WHERE id % 50 = 0 FOR UPDATE) locked;

-- the same relation shrinks to nothing and grows again within one file
CREATE TABLE shrinking (a int, b text);
INSERT INTO shrinking SELECT g, repeat('s', 100) FROM generate_series(1, :N) g;
VACUUM shrinking;
DELETE FROM shrinking;
VACUUM (TRUNCATE on) shrinking;
INSERT INTO shrinking SELECT g, 'new' FROM generate_series(1, :N / 10) g;
BEGIN; CREATE TABLE made_and_emptied (a int); INSERT INTO made_and_emptied SELECT generate_series(1, 3000); TRUNCATE made_and_emptied; INSERT INTO made_and_emptied VALUES (1); COMMIT;

-- subtransactions, two-phase commit, multixacts through row locks of subtransactions
CREATE TABLE nested (a int PRIMARY KEY, b text);
DO $$ BEGIN FOR i IN 1..300 LOOP BEGIN INSERT INTO nested VALUES (i % 200, 'x' || i); EXCEPTION WHEN unique_violation THEN UPDATE nested SET b = 'dup' || i WHERE a = i % 200; END; END LOOP; END $$;
BEGIN; INSERT INTO nested SELECT g, '2pc' FROM generate_series(2000, 2100) g; CREATE TABLE made_by_2pc (a int); SAVEPOINT s; DELETE FROM nested WHERE a < 5; PREPARE TRANSACTION 'first';
BEGIN; INSERT INTO nested SELECT g, '2pc' FROM generate_series(3000, 3100) g; CREATE TABLE never_made (a int); PREPARE TRANSACTION 'second';
COMMIT PREPARED 'first';
ROLLBACK PREPARED 'second';
DO $$ BEGIN FOR i IN 1..200 LOOP BEGIN PERFORM 1 FROM hot WHERE id = i * 4 + 1 FOR KEY SHARE; BEGIN UPDATE hot SET v = v + 1 WHERE id = i * 4 + 1; EXCEPTION WHEN division_by_zero THEN NULL; END; END; END LOOP; END $$;

-- index maintenance
DELETE FROM every_index WHERE id % 4 = 0;
VACUUM every_index;
SELECT fill(:N / 8, 4);
UPDATE every_index SET k = k + 1, h = md5(h) WHERE id % 5 = 0;
VACUUM every_index;
REINDEX TABLE every_index;
SELECT brin_summarize_new_values('every_index_at_idx');
CREATE TABLE posting (a int[]);
CREATE INDEX posting_a ON posting USING gin (a) WITH (fastupdate = off);
INSERT INTO posting SELECT ARRAY[1, 2, g % 5, g] FROM generate_series(1, :N / 2) g;
DELETE FROM posting;
VACUUM posting;
CREATE TABLE buckets (a int);
CREATE INDEX buckets_a ON buckets USING hash (a);
INSERT INTO buckets SELECT g % 200 FROM generate_series(1, :N / 2) g;
INSERT INTO buckets SELECT g FROM generate_series(1, :N / 2) g;
DELETE FROM buckets WHERE a < 200;
VACUUM buckets;

-- relations and databases that come and go
CREATE SEQUENCE counter;
SELECT count(nextval('counter')) FROM generate_series(1, 500);
CREATE UNLOGGED TABLE unlogged (a int PRIMARY KEY);
INSERT INTO unlogged SELECT generate_series(1, 1000);
CREATE TABLE rewritten AS SELECT g AS a, md5(g::text) AS b FROM generate_series(1, 3000) g;
TRUNCATE rewritten;
INSERT INTO rewritten SELECT 1, 'x';
BEGIN; TRUNCATE rewritten; INSERT INTO rewritten SELECT 2, 'rolled back'; ROLLBACK;
BEGIN; CREATE TABLE aborted AS SELECT generate_series(1, 2000); ROLLBACK;
CREATE TABLE dropped AS SELECT generate_series(1, 3000) AS a;
DROP TABLE dropped;
CREATE DATABASE by_wal STRATEGY = wal_log;
CREATE DATABASE by_copy STRATEGY = file_copy;
CREATE DATABASE gone;
DROP DATABASE gone;
CLUSTER hot USING hot_pkey;
VACUUM FULL nested;
VACUUM FULL pg_class;
ALTER TABLE wide ALTER id TYPE bigint;
CREATE MATERIALIZED VIEW viewed AS SELECT k, count(*) FROM every_index GROUP BY k;
SELECT pg_logical_emit_message(true, 'ignored', 'hello');
SELECT pg_logical_emit_message(false, 'neon-file:pg_logical/mappings/test1', 'kept');
SELECT lo_from_bytea(0, decode(repeat('ab', 20000), 'hex'));
CREATE TABLE undecided (a int);
BEGIN; INSERT INTO undecided VALUES (5000); SAVEPOINT s; INSERT INTO undecided VALUES (5001); PREPARE TRANSACTION 'left prepared';
SELECT pg_switch_wal();
VACUUM;
SELECT fill(:N / 8, 6);
