-- Partitions come without stopping anybody, and months go in one step.

-- As in 0001, but the partition is made apart and then attached: CREATE TABLE ... PARTITION OF takes an exclusive lock on
-- the partitioned table, for which every writer waits, and which deadlocks with those that already hold a part of
-- theirs. Attaching gets along with writers; only new customers wait a moment, for the foreign key.
CREATE OR REPLACE FUNCTION ensure_purchases_month(month date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    suffix text := to_char(month, 'YYYY_MM');
    next_month date := month + interval '1 month';
    receipts_month date;
BEGIN
    IF month <> date_trunc('month', month) OR month > now() + interval '1 year'
        OR month < (SELECT coalesce(max(dropped_before), '2000-01-01') FROM chain_settings)
    THEN
        RAISE EXCEPTION 'no purchase can lie in the month %', month USING ERRCODE = 'datetime_field_overflow';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_purchases_month'));
    IF to_regclass('purchases_' || suffix) IS NULL THEN
        EXECUTE format('CREATE TABLE %I (LIKE purchases INCLUDING DEFAULTS INCLUDING CONSTRAINTS)',
            'purchases_' || suffix);
        EXECUTE format('ALTER TABLE purchases ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            'purchases_' || suffix, month::timestamptz, next_month::timestamptz);
    END IF;
    IF to_regclass('purchase_items_' || suffix) IS NULL THEN
        EXECUTE format('CREATE TABLE %I (LIKE purchase_items INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
            UNIQUE (purchase_id, product_id),
            FOREIGN KEY (purchase_id, purchase_time) REFERENCES %I (purchase_id, purchase_time))',
            'purchase_items_' || suffix, 'purchases_' || suffix);
        EXECUTE format('ALTER TABLE purchase_items ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            'purchase_items_' || suffix, month::timestamptz, next_month::timestamptz);
    END IF;
    -- At its edges, a month in UTC has business days of the month before or after.
    FOREACH receipts_month IN ARRAY ARRAY[month - interval '1 month', month, next_month]::date[] LOOP
        IF to_regclass('receipts_' || to_char(receipts_month, 'YYYY_MM')) IS NULL THEN
            EXECUTE format('CREATE TABLE %I (LIKE receipts)', 'receipts_' || to_char(receipts_month, 'YYYY_MM'));
            EXECUTE format('ALTER TABLE receipts ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                'receipts_' || to_char(receipts_month, 'YYYY_MM'), receipts_month,
                (receipts_month + interval '1 month')::date);
        END IF;
    END LOOP;
END $$;

-- As in 0002, attached for the same reason.
CREATE OR REPLACE FUNCTION ensure_outbox_day(day date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    partition text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
BEGIN
    IF day < '2000-01-01' OR day > now() + interval '1 year' THEN
        RAISE EXCEPTION 'no event can lie on the day %', day USING ERRCODE = 'datetime_field_overflow';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_outbox_day'));
    IF to_regclass(partition) IS NULL THEN
        EXECUTE format('CREATE TABLE %I (LIKE outbox_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
        EXECUTE format('ALTER TABLE outbox_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            partition, uuid7_floor(day::timestamptz), uuid7_floor((day + 1)::timestamptz));
    END IF;
END $$;

-- Closes a month that is past the retention: what is being written to it is finished first, and nothing can be written
-- to it any more. To be called in a transaction of its own, since it must hold no other lock. Whoever only looked, and
-- dropped then, would lose what commits in between.
CREATE FUNCTION close_purchases_month(month date, keep_months int) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    partition text := 'purchases_' || to_char(month, 'YYYY_MM');
BEGIN
    IF keep_months < 1 OR month <> date_trunc('month', month) OR month >= retention_horizon(keep_months) THEN
        RAISE EXCEPTION 'the month % is kept', month USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_purchases_month'));
    UPDATE chain_settings SET dropped_before = (month + interval '1 month')::date
        WHERE dropped_before < (month + interval '1 month')::date;
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass(partition) AND conname = 'closed')
        AND to_regclass(partition) IS NOT NULL
    THEN
        EXECUTE format('ALTER TABLE %I ADD CONSTRAINT closed CHECK (false) NOT VALID', partition);
    END IF;
END $$;

-- Drops a closed month, unless something speaks against it; returns that, or null when the month is gone. Its
-- idempotency keys are left to delete_keys_of_dropped_month, which takes long, while no sale must ever be stored whose
-- key is gone; the purchases' table, detached, stays until then to tell the keys.
--
-- Locks are taken in the order in which everybody takes them: the partitioned tables first. Items go before purchases,
-- and nothing is dropped by CASCADE.
CREATE OR REPLACE FUNCTION drop_purchases_month(month date, keep_months int) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    suffix text := to_char(month, 'YYYY_MM');
    edge text := 'receipts_' || to_char(month - interval '1 month', 'YYYY_MM');
    unsent_status text;
    unsent bigint;
BEGIN
    IF keep_months < 1 OR month <> date_trunc('month', month) OR month >= retention_horizon(keep_months) THEN
        RAISE EXCEPTION 'the month % is kept', month USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_purchases_month'));
    IF to_regclass('purchases_' || suffix) IS NULL THEN
        RETURN 'there is no such month';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass('purchases_' || suffix) AND conname = 'closed') THEN
        RETURN 'it is not closed';
    END IF;
    FOREACH unsent_status IN ARRAY ARRAY['NEW', 'FAILED'] LOOP -- one by one: each has its partial index
        EXECUTE format('SELECT FROM outbox_events e JOIN %I p ON p.purchase_id = e.aggregate_id
            WHERE e.status = %L LIMIT 1', 'purchases_' || suffix, unsent_status);
        GET DIAGNOSTICS unsent = ROW_COUNT;
        IF unsent > 0 THEN
            RETURN 'some of its events are ' || unsent_status;
        END IF;
    END LOOP;
    LOCK TABLE ONLY receipts, ONLY purchases, ONLY purchase_items IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('DROP TABLE %I', 'purchase_items_' || suffix);
    EXECUTE format('ALTER TABLE purchases DETACH PARTITION %I', 'purchases_' || suffix);
    EXECUTE format('ALTER TABLE %I RENAME TO %I', 'purchases_' || suffix, 'dropped_purchases_' || suffix);
    -- Business days of the month before may hold purchases of this month, hence its receipts go only now.
    IF to_regclass(edge) IS NOT NULL AND to_regclass('purchases_' || to_char(month - interval '1 month', 'YYYY_MM')) IS NULL THEN
        EXECUTE format('DROP TABLE %I', edge);
    END IF;
    RETURN NULL;
END $$;

DROP FUNCTION delete_keys_of_month(date, int, int);

-- Months that are dropped and still have keys.
CREATE FUNCTION dropped_months() RETURNS SETOF date
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC'
BEGIN ATOMIC
    SELECT to_date(right(relname, 7), 'YYYY_MM') FROM pg_class
    WHERE relkind = 'r' AND relname ~ '^dropped_purchases_[0-9]{4}_[0-9]{2}$' AND relnamespace = 'public'::regnamespace
    ORDER BY 1;
END;

-- Deletes the keys of the `most` purchases after `after` (null: the first ones) of a dropped month; returns where it
-- came to, to go on from there, or null when all keys of the month are gone. It may be begun anew at any time. Each
-- call goes through the index, whatever the statistics say, and so is as short as the first.
CREATE FUNCTION delete_keys_of_dropped_month(month date, after uuid, most int) RETURNS uuid
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    dropped text := 'dropped_purchases_' || to_char(month, 'YYYY_MM');
    keys uuid[];
    last uuid;
BEGIN
    IF to_regclass(dropped) IS NULL THEN
        RETURN NULL; -- somebody else was quicker
    END IF;
    EXECUTE format('SELECT array_agg(idempotency_key), (array_agg(purchase_id ORDER BY purchase_id DESC))[1] FROM (
        SELECT purchase_id, idempotency_key FROM %I WHERE purchase_id > $1 ORDER BY purchase_id LIMIT $2) AS p', dropped)
        USING coalesce(after, '00000000-0000-0000-0000-000000000000'), most INTO keys, last;
    IF last IS NULL THEN
        EXECUTE format('DROP TABLE %I', dropped);
    ELSE
        -- Begun anew, it may meet a key again that a later sale has taken meanwhile.
        DELETE FROM idempotency_keys k WHERE k.idempotency_key = ANY (keys)
            AND k.purchase_time >= month AND k.purchase_time < month + interval '1 month';
    END IF;
    RETURN last;
END $$;

-- As in 0003, but it reads the unsent events once, not once for each month; their purchases' ids tell the months.
CREATE OR REPLACE FUNCTION purchases_months(OUT month date, OUT purchases bigint, OUT bytes bigint, OUT unsent bigint)
    RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = public, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
BEGIN ATOMIC
    WITH unsent_events AS (
        SELECT aggregate_id FROM outbox_events WHERE status = 'NEW'
        UNION ALL
        SELECT aggregate_id FROM outbox_events WHERE status = 'FAILED'
    ), unsent_months AS (
        SELECT date_trunc('month', to_timestamp(
                   ('x' || left(translate(aggregate_id::text, '-', ''), 12))::bit(48)::bigint / 1000.0))::date AS month,
               count(*) AS events
        FROM unsent_events GROUP BY 1
    ), months AS (
        SELECT to_date(right(c.relname, 7), 'YYYY_MM') AS month, c.reltuples, c.oid,
               to_regclass('purchase_items_' || right(c.relname, 7)) AS items
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'purchases'::regclass
    )
    SELECT m.month, greatest(m.reltuples, 0)::bigint,
           pg_total_relation_size(m.oid) + coalesce(pg_total_relation_size(m.items), 0), coalesce(u.events, 0)
    FROM months m LEFT JOIN unsent_months u USING (month) ORDER BY 1;
END;

REVOKE EXECUTE ON FUNCTION close_purchases_month(date, int), dropped_months(),
    delete_keys_of_dropped_month(date, uuid, int) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION close_purchases_month(date, int), dropped_months(),
    delete_keys_of_dropped_month(date, uuid, int) TO purchases_service;
