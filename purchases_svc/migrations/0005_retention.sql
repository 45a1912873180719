-- Dropping months that are older than the retention, in steps: close, drop, delete the keys. The functions run as their
-- owner, since services may neither delete nor run DDL. How long purchases are kept is the owner's word in
-- chain_settings; whoever calls only carries it out.

-- The first month that is kept; null: all are.
CREATE FUNCTION retention_horizon() RETURNS date
    LANGUAGE sql STABLE SET timezone = 'UTC'
    RETURN (SELECT (date_trunc('month', now()) - keep_months * interval '1 month')::date
        FROM public.chain_settings WHERE keep_months > 0);

-- Whether it is a month, and one that is kept no longer. Years before Christ have names like ours.
CREATE FUNCTION is_past_retention(month date) RETURNS boolean
    LANGUAGE sql STABLE SET timezone = 'UTC'
    RETURN coalesce(month >= '2000-01-01' AND month = date_trunc('month', month) AND month < public.retention_horizon(),
        false);

-- Closes a month that is past the retention: what is being written to it is finished first, and nothing can be written
-- to it any more. To be called in a transaction of its own, since it must hold no other lock. Whoever only looked, and
-- dropped then, would lose what commits in between.
CREATE FUNCTION close_purchases_month(month date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    purchases text := 'purchases_' || to_char(month, 'YYYY_MM');
BEGIN
    IF NOT public.is_past_retention(month) THEN
        RAISE EXCEPTION 'the month % is kept', month USING ERRCODE = 'invalid_parameter_value';
    END IF;
    LOCK TABLE public.months_lock;
    UPDATE public.chain_settings SET dropped_before = (month + interval '1 month')::date
        WHERE dropped_before < (month + interval '1 month')::date;
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass('public.' || purchases) AND conname = 'closed')
        AND to_regclass('public.' || purchases) IS NOT NULL
    THEN
        EXECUTE format('ALTER TABLE public.%I ADD CONSTRAINT closed CHECK (false) NOT VALID', purchases);
    END IF;
END $$;

-- Drops a closed month, unless something speaks against it; returns that, or null when the month is gone. Its
-- idempotency keys are left to delete_keys_of_dropped_month, which takes long, while no sale must ever be stored whose
-- key is gone; the purchases' table, detached, stays until then to tell the keys.
--
-- Locks are taken in the order in which everybody takes them: the partitioned tables first. Items go before purchases,
-- and nothing is dropped by CASCADE.
CREATE FUNCTION drop_purchases_month(month date) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    purchases text := 'purchases_' || to_char(month, 'YYYY_MM');
    last_month text := to_char(month - interval '1 month', 'YYYY_MM');
    unsent text;
BEGIN
    IF NOT public.is_past_retention(month) THEN
        RAISE EXCEPTION 'the month % is kept', month USING ERRCODE = 'invalid_parameter_value';
    END IF;
    LOCK TABLE public.months_lock;
    IF to_regclass('public.' || purchases) IS NULL THEN
        RETURN 'there is no such month';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass('public.' || purchases) AND conname = 'closed')
    THEN
        RETURN 'it is not closed';
    END IF;
    EXECUTE format('SELECT e.status FROM public.unsent_purchases() e JOIN public.%I p USING (purchase_id) LIMIT 1',
        purchases) INTO unsent;
    IF unsent IS NOT NULL THEN
        RETURN 'some of its events are ' || unsent;
    END IF;
    LOCK TABLE ONLY public.receipts, ONLY public.purchases, ONLY public.purchase_items IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('DROP TABLE public.%I', 'purchase_items_' || to_char(month, 'YYYY_MM'));
    EXECUTE format('ALTER TABLE public.purchases DETACH PARTITION public.%I', purchases);
    EXECUTE format('ALTER TABLE public.%I RENAME TO %I', purchases, 'dropped_' || purchases);
    -- Business days of the month before may hold purchases of this month, hence its receipts go only now.
    IF to_regclass('public.receipts_' || last_month) IS NOT NULL AND to_regclass('public.purchases_' || last_month) IS NULL
    THEN
        EXECUTE format('DROP TABLE public.%I', 'receipts_' || last_month);
    END IF;
    RETURN NULL;
END $$;

-- Months that are dropped and still have keys.
CREATE FUNCTION dropped_months() RETURNS SETOF date
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC'
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
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    dropped text := 'dropped_purchases_' || to_char(month, 'YYYY_MM');
    keys uuid[];
    last uuid;
BEGIN
    IF to_regclass('public.' || dropped) IS NULL OR month < '2000-01-01' THEN
        RETURN NULL; -- somebody else was quicker
    END IF;
    EXECUTE format('SELECT array_agg(idempotency_key), (array_agg(purchase_id ORDER BY purchase_id DESC))[1] FROM (
        SELECT purchase_id, idempotency_key FROM public.%I WHERE purchase_id > $1 ORDER BY purchase_id LIMIT $2) AS p',
        dropped) USING coalesce(after, '00000000-0000-0000-0000-000000000000'), most INTO keys, last;
    IF last IS NULL THEN
        EXECUTE format('DROP TABLE public.%I', dropped);
    ELSE
        -- Begun anew, it may meet a key again that a later sale has taken meanwhile.
        DELETE FROM public.idempotency_keys k WHERE k.idempotency_key = ANY (keys)
            AND k.purchase_time >= month AND k.purchase_time < month + interval '1 month';
    END IF;
    RETURN last;
END $$;

-- What an operator wants to know of each month, oldest first. It reads the unsent events once, not once for each month;
-- their purchases' ids tell the months.
CREATE FUNCTION purchases_months(OUT month date, OUT purchases bigint, OUT bytes bigint, OUT unsent bigint)
    RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
BEGIN ATOMIC
    WITH unsent_months AS (
        SELECT date_trunc('month', to_timestamp(
                   ('x' || left(translate(purchase_id::text, '-', ''), 12))::bit(48)::bigint / 1000.0))::date AS month,
               count(*) AS events
        FROM public.unsent_purchases() GROUP BY 1
    ), months AS (
        SELECT to_date(right(c.relname, 7), 'YYYY_MM') AS month, c.reltuples, c.oid,
               to_regclass('public.purchase_items_' || right(c.relname, 7)) AS items
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'public.purchases'::regclass
    )
    SELECT m.month, greatest(m.reltuples, 0)::bigint,
           pg_total_relation_size(m.oid) + coalesce(pg_total_relation_size(m.items), 0), coalesce(u.events, 0)
    FROM months m LEFT JOIN unsent_months u USING (month) ORDER BY 1;
END;
COMMENT ON FUNCTION purchases_months IS 'purchases is the planner''s estimate: counting would read everything.';

REVOKE EXECUTE ON FUNCTION close_purchases_month(date), drop_purchases_month(date), dropped_months(),
    delete_keys_of_dropped_month(date, uuid, int), purchases_months() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION close_purchases_month(date), drop_purchases_month(date), dropped_months(),
    delete_keys_of_dropped_month(date, uuid, int), purchases_months() TO purchases_service;
