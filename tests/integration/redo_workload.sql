-- Makes WAL of every kind that changes pages. psql variables: n (rows, 1000 is small), copyfile, tablespace (an empty directory).
\set VERBOSITY terse
CREATE EXTENSION pg_trgm;
CREATE EXTENSION btree_gist;
CREATE EXTENSION btree_gin;
CREATE EXTENSION bloom;
CREATE SEQUENCE plain_sequence;
CREATE SEQUENCE cached_sequence CACHE 10;

-- one table with every access method, several operator classes each
CREATE TABLE everything (id bigserial PRIMARY KEY, k int, h text, numbers int[], doc tsvector, p point, b box, r int4range, ip inet,
                         ts timestamptz, payload text);
CREATE INDEX ON everything USING btree (k);
CREATE INDEX ON everything USING btree (h);
CREATE INDEX ON everything USING hash (h);
CREATE INDEX ON everything USING hash (k);
CREATE INDEX ON everything USING gin (numbers);
CREATE INDEX everything_doc ON everything USING gin (doc) WITH (fastupdate = on, gin_pending_list_limit = 64);
CREATE INDEX ON everything USING gin (payload gin_trgm_ops) WITH (fastupdate = off);
CREATE INDEX ON everything USING gist (p);
CREATE INDEX ON everything USING gist (b);
CREATE INDEX ON everything USING gist (r);
CREATE INDEX ON everything USING gist (k, ts);
CREATE INDEX ON everything USING spgist (p);
CREATE INDEX ON everything USING spgist (h);
CREATE INDEX ON everything USING spgist (ip);
CREATE INDEX everything_ts ON everything USING brin (ts) WITH (pages_per_range = 2, autosummarize = on);
CREATE INDEX ON everything USING brin (b box_inclusion_ops) WITH (pages_per_range = 4);
CREATE INDEX ON everything USING brin (id int8_minmax_multi_ops) WITH (pages_per_range = 4);
CREATE INDEX ON everything USING bloom (k, h);
CREATE FUNCTION fill(n int, seed int) RETURNS void LANGUAGE sql AS $$
  INSERT INTO everything (k, h, numbers, doc, p, b, r, ip, ts, payload)
  SELECT (random() * 1000)::int, md5((g % 500)::text || seed), ARRAY[g % 100, g % 37, (random() * 5000)::int],
         to_tsvector('simple', md5(g::text) || ' ' || md5((g % 50)::text) || ' w' || (g % 13)), point(random() * 1000, random() * 1000),
         box(point(random() * 1000, random() * 1000), point(random() * 1000, random() * 1000)),
         int4range((random() * 1000)::int, 1000 + (random() * 1000)::int),
         ('10.' || (g % 256) || '.' || ((g / 256) % 256) || '.' || (random() * 255)::int)::inet, now() + g * interval '1 s',
         repeat(md5(random()::text), 1 + g % 4)
  FROM generate_series(1, n) g $$;
SELECT fill(:n / 2, 1);
CHECKPOINT;
SELECT fill(:n / 2, 2);

-- out-of-line values
CREATE TABLE toasted (id int PRIMARY KEY, compressed text, plain text);
ALTER TABLE toasted ALTER COLUMN plain SET STORAGE EXTERNAL;
INSERT INTO toasted SELECT g, repeat(md5(g::text) || random(), 100), repeat(md5(g::text), 150) FROM generate_series(1, :n / 20) g;
UPDATE toasted SET plain = plain || 'x' WHERE id % 3 = 0;
DELETE FROM toasted WHERE id % 5 = 0;

-- HOT chains, pruning, vacuum, freezing, truncation
CREATE TABLE hot (id int PRIMARY KEY, v int, f text) WITH (fillfactor = 60);
INSERT INTO hot SELECT g, 0, repeat('a', 50) FROM generate_series(1, :n * 2) g;
VACUUM hot;
UPDATE hot SET v = v + 1 WHERE id % 2 = 0;
UPDATE hot SET v = v + 1 WHERE id % 2 = 0;
UPDATE hot SET v = v + 1 WHERE id % 3 = 0;
SELECT count(*), sum(v) FROM hot WHERE id > 0;
DELETE FROM hot WHERE id % 7 = 0;
VACUUM hot;
UPDATE hot SET f = repeat('b', 150) WHERE id % 11 = 0;
VACUUM FREEZE hot;
UPDATE hot SET v = v - 1 WHERE id % 13 = 0;
DELETE FROM hot WHERE id > :n;
VACUUM (TRUNCATE on) hot;
INSERT INTO hot SELECT g, 5, 'again' FROM generate_series(:n + 1, :n * 2) g ON CONFLICT (id) DO UPDATE SET v = excluded.v;
INSERT INTO hot SELECT g, 7, 'conflict' FROM generate_series(1, :n / 5) g ON CONFLICT (id) DO UPDATE SET v = excluded.v;

-- bulk loading, with and without freezing
COPY hot TO :'copyfile';
CREATE TABLE loaded (LIKE hot);
COPY loaded FROM :'copyfile';
BEGIN; CREATE TABLE frozen (LIKE hot); COPY frozen FROM :'copyfile' (FREEZE); COMMIT;
UPDATE frozen SET v = v + 1 WHERE id % 50 = 0;
DELETE FROM frozen WHERE id % 49 = 0;
SELECT count(*) FROM (SELECT * FROM frozen WHERE id % 48 = 0 FOR SHARE) x;

SELECT count(nextval('plain_sequence')) FROM generate_series(1, 200);
SELECT count(nextval('cached_sequence')) FROM generate_series(1, 200);
SELECT setval('plain_sequence', 99999);

-- subtransactions and two-phase commit
CREATE TABLE sub (a int PRIMARY KEY, b text);
DO $$ BEGIN FOR i IN 1..300 LOOP
  BEGIN INSERT INTO sub VALUES (i % 200, 'x' || i); EXCEPTION WHEN unique_violation THEN UPDATE sub SET b = 'dup' || i WHERE a = i % 200; END;
END LOOP; END $$;
BEGIN; SAVEPOINT a; INSERT INTO sub VALUES (1000, 'a'); SAVEPOINT b; INSERT INTO sub VALUES (1001, 'b'); ROLLBACK TO b; RELEASE a; COMMIT;
BEGIN; INSERT INTO sub SELECT g, '2pc' FROM generate_series(2000, 2100) g; CREATE TABLE made_by_2pc (a int); PREPARE TRANSACTION 'p1';
BEGIN; INSERT INTO sub SELECT g, '2pc' FROM generate_series(3000, 3100) g; SAVEPOINT s; DELETE FROM sub WHERE a < 50; PREPARE TRANSACTION 'p2';
COMMIT PREPARED 'p1';
ROLLBACK PREPARED 'p2';
DROP TABLE made_by_2pc;

-- btree: deduplication, page deletion, rebuild
CREATE TABLE bt (a int, b int);
INSERT INTO bt SELECT g, g % 10 FROM generate_series(1, :n * 3) g;
CREATE INDEX bt_a ON bt (a);
CREATE INDEX bt_b ON bt (b);
DELETE FROM bt WHERE a BETWEEN :n AND :n * 2;
VACUUM bt;
INSERT INTO bt SELECT g, g % 3 FROM generate_series(1, :n) g;
DELETE FROM bt;
VACUUM bt;
INSERT INTO bt SELECT (random() * 1e6)::int, g % 3 FROM generate_series(1, :n) g;
UPDATE bt SET b = b + 1;
REINDEX INDEX bt_a;

-- index vacuum in all access methods
DELETE FROM everything WHERE id % 4 = 0;
VACUUM everything;
SELECT fill(:n / 4, 4);
UPDATE everything SET k = k + 1, h = md5(h), p = point(random() * 1000, random() * 1000) WHERE id % 5 = 0;
SELECT gin_clean_pending_list('everything_doc');
DELETE FROM everything WHERE id % 2 = 1;
VACUUM everything;
SELECT fill(:n / 8, 5);
SELECT brin_summarize_new_values('everything_ts'), brin_desummarize_range('everything_ts', 0);
SELECT brin_summarize_new_values('everything_ts');
SET enable_seqscan = off; SELECT count(*) FROM everything WHERE h = md5('3' || 1); RESET enable_seqscan;

-- posting trees, radix trees, bucket splits and squeezes
CREATE TABLE posting (a int[]);
CREATE INDEX ON posting USING gin (a) WITH (fastupdate = off);
INSERT INTO posting SELECT ARRAY[1, 2, g % 5, g] FROM generate_series(1, :n * 3) g;
DELETE FROM posting WHERE a[4] % 3 <> 0;
VACUUM posting;
INSERT INTO posting SELECT ARRAY[1, 3, g % 7, g] FROM generate_series(1, :n / 2) g;
DELETE FROM posting;
VACUUM posting;
CREATE TABLE radix (t text);
CREATE INDEX ON radix USING spgist (t);
INSERT INTO radix SELECT repeat('p', g % 60) || md5(g::text) FROM generate_series(1, :n) g;
DELETE FROM radix WHERE length(t) % 3 = 0;
VACUUM radix;
INSERT INTO radix SELECT repeat('q', g % 60) || md5(g::text) FROM generate_series(1, :n / 2) g;
VACUUM radix;
CREATE TABLE hashed (a int);
CREATE INDEX ON hashed USING hash (a);
INSERT INTO hashed SELECT g % 200 FROM generate_series(1, :n * 2) g;
INSERT INTO hashed SELECT g FROM generate_series(1, :n) g;
DELETE FROM hashed WHERE a < 200;
VACUUM hashed;
INSERT INTO hashed SELECT g FROM generate_series(1, :n / 2) g;
DELETE FROM hashed WHERE a % 2 = 0;
VACUUM hashed;

-- files that come, go and are rewritten
CREATE UNLOGGED TABLE unlogged (a int PRIMARY KEY);
INSERT INTO unlogged SELECT g FROM generate_series(1, 1000) g;
CREATE TABLE truncated AS SELECT g a, md5(g::text) b FROM generate_series(1, 2000) g;
TRUNCATE truncated;
INSERT INTO truncated SELECT 1, 'x';
BEGIN; TRUNCATE truncated; INSERT INTO truncated SELECT 2, 'rolled back'; ROLLBACK;
BEGIN; CREATE TABLE aborted AS SELECT generate_series(1, 1000); ROLLBACK;
CREATE TABLE dropped AS SELECT g a FROM generate_series(1, 2000) g;
DROP TABLE dropped;
CREATE TABLESPACE elsewhere LOCATION :'tablespace';
CREATE TABLE far (a int PRIMARY KEY, b text) TABLESPACE elsewhere;
INSERT INTO far SELECT g, md5(g::text) FROM generate_series(1, 500) g;
UPDATE far SET b = b || 'x' WHERE a % 3 = 0;
CREATE DATABASE copied_by_wal STRATEGY = wal_log;
CREATE DATABASE copied_by_file STRATEGY = file_copy;
CREATE DATABASE gone;
DROP DATABASE gone;
CLUSTER hot USING hot_pkey;
VACUUM FULL sub;
ALTER TABLE toasted ALTER id TYPE bigint;
VACUUM FULL pg_class;
CREATE MATERIALIZED VIEW counts AS SELECT k, count(*) FROM everything GROUP BY k;
REFRESH MATERIALIZED VIEW counts;
SELECT pg_logical_emit_message(true, 'prefix', 'hello');
SELECT lo_from_bytea(0, decode(repeat('ab', 20000), 'hex'));
SELECT pg_switch_wal();
VACUUM;
ANALYZE;
VACUUM FREEZE;
SELECT fill(:n / 8, 6);
UPDATE frozen SET v = v + 1;
DELETE FROM frozen WHERE id % 3 = 0;
VACUUM frozen;
CHECKPOINT;
SELECT fill(:n / 8, 7);
