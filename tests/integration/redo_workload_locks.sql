\set a random(1, 100)
\set k random(1, 7)
BEGIN;
SELECT v FROM hot WHERE id = :a FOR KEY SHARE;
SELECT v FROM hot WHERE id = :a FOR SHARE;
SAVEPOINT s1;
UPDATE hot SET v = v + 1 WHERE id = :a;
ROLLBACK TO s1;
SELECT count(*) FROM (SELECT v FROM hot WHERE id = :a FOR NO KEY UPDATE) x;
COMMIT;
BEGIN;
SELECT v FROM hot WHERE id = :a FOR SHARE;
UPDATE hot SET v = v + 1 WHERE id = :a;
SAVEPOINT s2;
UPDATE hot SET f = f || 'z' WHERE id = :a AND length(f) < 60;
COMMIT;
INSERT INTO everything (k, h, numbers, doc, p, b, r, ip, ts, payload)
  VALUES (:a, md5(:a::text), ARRAY[:a, :k], to_tsvector('simple', 'w:k x:a'), point(:a, :k), box(point(:a, :k), point(:k, :a)),
          int4range(:k, :a + 10), '10.0.0.1', now(), md5(:a::text));
DELETE FROM everything WHERE id = :a;
UPDATE everything SET payload = payload || 'u' WHERE id = :a + 1;
SELECT nextval('plain_sequence');
