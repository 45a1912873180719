-- Dropping months that are older than the retention. Both functions run as their owner, since services may neither
-- delete nor run DDL. They refuse the current month and the last, and every month that the caller's retention keeps.

-- The first month that is kept.
CREATE FUNCTION retention_horizon(keep_months int) RETURNS date
    LANGUAGE sql STABLE STRICT SET timezone = 'UTC'
    RETURN (date_trunc('month', now()) - keep_months * interval '1 month')::date;

-- Deletes some of the idempotency keys of a month that is to go; returns how many. To be called until it returns 0, so
-- that no transaction is long. A sale of that month whose key is gone is refused for its age: it cannot come in twice.
CREATE FUNCTION delete_keys_of_month(month date, keep_months int, most int) RETURNS int
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC'
AS $$
DECLARE
    deleted int;
BEGIN
    IF keep_months < 1 OR month >= retention_horizon(keep_months) THEN
        RAISE EXCEPTION 'the month % is kept', month USING ERRCODE = 'invalid_parameter_value';
    END IF;
    DELETE FROM idempotency_keys WHERE idempotency_key IN (
        SELECT k.idempotency_key
        FROM purchases p JOIN idempotency_keys k USING (idempotency_key)
        WHERE p.purchase_time >= month AND p.purchase_time < month + interval '1 month'
        LIMIT most);
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $$;

-- Drops a month, unless something speaks against it; returns that, or null when the month is gone.
--
-- It locks the month first and looks then: an insert that commits between a look and a lock would lose its purchase and
-- leave its event without one. Items go before purchases, and nothing is dropped by CASCADE.
CREATE FUNCTION drop_purchases_month(month date, keep_months int) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    suffix text := to_char(month, 'YYYY_MM');
    edge text := 'receipts_' || to_char(month - interval '1 month', 'YYYY_MM');
    found bigint;
BEGIN
    IF keep_months < 1 OR month <> date_trunc('month', month) OR month >= retention_horizon(keep_months) THEN
        RAISE EXCEPTION 'the month % is kept', month USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_purchases_month'));
    IF to_regclass('purchases_' || suffix) IS NULL THEN
        RETURN 'there is no such month';
    END IF;
    EXECUTE format('LOCK TABLE %I, %I IN ACCESS EXCLUSIVE MODE', 'purchases_' || suffix, 'purchase_items_' || suffix);
    EXECUTE format('SELECT count(*) FROM outbox_events e WHERE e.status IN (''NEW'', ''FAILED'')
        AND EXISTS (SELECT FROM %I p WHERE p.purchase_id = e.aggregate_id)', 'purchases_' || suffix) INTO found;
    IF found > 0 THEN
        RETURN format('%s of its events are not sent', found);
    END IF;
    EXECUTE format('SELECT count(*) FROM (SELECT FROM %I p JOIN idempotency_keys k USING (idempotency_key) LIMIT 1) AS key',
        'purchases_' || suffix) INTO found;
    IF found > 0 THEN
        RETURN 'its idempotency keys are not deleted yet';
    END IF;
    UPDATE chain_settings SET dropped_before = greatest(dropped_before, (month + interval '1 month')::date);
    EXECUTE format('DROP TABLE %I', 'purchase_items_' || suffix);
    EXECUTE format('ALTER TABLE purchases DETACH PARTITION %I', 'purchases_' || suffix);
    EXECUTE format('DROP TABLE %I', 'purchases_' || suffix);
    -- Business days of the month before may hold purchases of this month, hence its receipts go only now.
    IF to_regclass(edge) IS NOT NULL AND to_regclass('purchases_' || to_char(month - interval '1 month', 'YYYY_MM')) IS NULL THEN
        EXECUTE format('DROP TABLE %I', edge);
    END IF;
    RETURN NULL;
END $$;

-- What an operator wants to know of each month, oldest first.
CREATE FUNCTION purchases_months(OUT month date, OUT purchases bigint, OUT bytes bigint, OUT unsent bigint)
    RETURNS SETOF record LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = public, pg_temp SET timezone = 'UTC'
AS $$
DECLARE
    suffix text;
BEGIN
    FOR suffix IN
        SELECT right(c.relname, 7) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'purchases'::regclass ORDER BY 1
    LOOP
        month := to_date(suffix, 'YYYY_MM');
        bytes := pg_total_relation_size(('purchases_' || suffix)::regclass)
            + pg_total_relation_size(('purchase_items_' || suffix)::regclass);
        SELECT greatest(reltuples, 0)::bigint INTO purchases FROM pg_class WHERE oid = ('purchases_' || suffix)::regclass;
        EXECUTE format('SELECT count(*) FROM outbox_events e WHERE e.status IN (''NEW'', ''FAILED'')
            AND EXISTS (SELECT FROM %I p WHERE p.purchase_id = e.aggregate_id)', 'purchases_' || suffix) INTO unsent;
        RETURN NEXT;
    END LOOP;
END $$;
COMMENT ON FUNCTION purchases_months IS 'purchases is the planner''s estimate: counting would read everything.';

REVOKE EXECUTE ON FUNCTION delete_keys_of_month(date, int, int), drop_purchases_month(date, int), purchases_months()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION delete_keys_of_month(date, int, int), drop_purchases_month(date, int), purchases_months()
    TO purchases_service;
