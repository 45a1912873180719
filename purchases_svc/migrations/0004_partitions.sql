-- Partitions come on demand and without stopping anybody. Services may not run DDL, so these functions run as their
-- owner, and only for months and days that can be. To be called in a transaction of its own, before the insert: in the
-- inserting statement it is too late. Safe to call from several places at once. They wait a second at most for locks,
-- because everybody else would queue up behind them; then they fail and are called again.
--
-- A partition is made apart and then attached: CREATE TABLE ... PARTITION OF takes an exclusive lock on the partitioned
-- table, for which every writer waits, and which deadlocks with those that already hold a part of theirs. Attaching
-- gets along with writers; only new customers wait a moment, for the foreign key.

-- One at a time. Nobody else may lock these tables, while an advisory lock is anybody's.
CREATE TABLE months_lock ();
CREATE TABLE days_lock ();

-- Makes sure that purchases of one month (UTC) can be stored. What was dropped is looked at once it has the lock: before,
-- the month could be dropped while it waits, and be made anew; its sales, whose keys are gone, could come in twice.
CREATE FUNCTION ensure_purchases_month(month date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    purchases text := 'purchases_' || to_char(month, 'YYYY_MM');
    items text := 'purchase_items_' || to_char(month, 'YYYY_MM');
    receipts text;
    next_month date := month + interval '1 month';
    receipts_month date;
BEGIN
    LOCK TABLE public.months_lock;
    IF month <> date_trunc('month', month) OR month > now() + interval '1 year'
        OR month < (SELECT coalesce(max(dropped_before), '2000-01-01') FROM public.chain_settings)
    THEN
        RAISE EXCEPTION 'no purchase can lie in the month %', month USING ERRCODE = 'datetime_field_overflow';
    END IF;
    IF to_regclass('public.' || purchases) IS NULL THEN
        -- Whoever analyzes one of them is waited for here: later, this would hold what every sale needs (attaching locks the
        -- customers against inserts, for the foreign key's triggers).
        LOCK TABLE ONLY public.purchases, ONLY public.purchase_items, ONLY public.receipts IN SHARE UPDATE EXCLUSIVE MODE;
        EXECUTE format('CREATE TABLE public.%I (LIKE public.purchases INCLUDING DEFAULTS INCLUDING CONSTRAINTS)',
            purchases);
        EXECUTE format('ALTER TABLE public.purchases ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
            purchases, month::timestamptz, next_month::timestamptz);
    END IF;
    IF to_regclass('public.' || items) IS NULL THEN
        -- The foreign key runs from month to month: both have the same bounds, so it says the same as one between the
        -- partitioned tables. That one looks through all months for each item: 67 us at 24 months instead of 3.
        EXECUTE format('CREATE TABLE public.%I (LIKE public.purchase_items INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
            UNIQUE (purchase_id, product_id),
            FOREIGN KEY (purchase_id, purchase_time) REFERENCES public.%I (purchase_id, purchase_time))',
            items, purchases);
        EXECUTE format('ALTER TABLE public.purchase_items ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
            items, month::timestamptz, next_month::timestamptz);
    END IF;
    -- At its edges, a month in UTC has business days of the month before or after.
    FOREACH receipts_month IN ARRAY ARRAY[month - interval '1 month', month, next_month]::date[] LOOP
        receipts := 'receipts_' || to_char(receipts_month, 'YYYY_MM');
        IF to_regclass('public.' || receipts) IS NULL THEN
            EXECUTE format('CREATE TABLE public.%I (LIKE public.receipts)', receipts);
            EXECUTE format('ALTER TABLE public.receipts ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
                receipts, receipts_month, (receipts_month + interval '1 month')::date);
        END IF;
    END LOOP;
END $$;

-- The days of the outbox. Statements name those that they are about: each partition that is looked at, or only planned
-- for, takes a lock, and one for each of its indexes, of which a server has some thousands. Most questions are about
-- days that are open; years of settled ones cost nothing.
CREATE TABLE outbox_calendar (
    day date PRIMARY KEY,
    settled_in text,
    last_xid xid8,
    failed int NOT NULL DEFAULT 0
);
COMMENT ON COLUMN outbox_calendar.settled_in IS 'Null: the day is open. Otherwise nothing in it waits, nothing can be '
    'written to it, and this is the realm in which last_xid has its meaning.';
COMMENT ON COLUMN outbox_calendar.last_xid IS 'The last transaction of which a settled day has an event; null: none.';
COMMENT ON COLUMN outbox_calendar.failed IS 'How many events of a settled day are FAILED.';
GRANT SELECT ON outbox_calendar TO purchases_service, purchases_relay;

-- Has a day that is settled written to again. Until the transaction ends, nobody settles it.
CREATE FUNCTION reopen_outbox_day(day date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s'
AS $$
DECLARE
    was_settled boolean;
BEGIN
    SELECT c.settled_in IS NOT NULL INTO was_settled FROM public.outbox_calendar c
        WHERE c.day = reopen_outbox_day.day FOR UPDATE;
    IF was_settled THEN
        EXECUTE format('ALTER TABLE public.%I DROP CONSTRAINT IF EXISTS settled',
            'outbox_events_' || to_char(day, 'YYYY_MM_DD'));
        UPDATE public.outbox_calendar c SET settled_in = NULL, last_xid = NULL, failed = 0
            WHERE c.day = reopen_outbox_day.day;
    END IF;
END $$;

-- Makes sure that events of one day (UTC, by the clock of the service that made the id) can be stored.
CREATE FUNCTION ensure_outbox_day(day date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    events text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
BEGIN
    IF day < '2000-01-01' OR day > now() + interval '1 year' THEN
        RAISE EXCEPTION 'no event can lie on the day %', day USING ERRCODE = 'datetime_field_overflow';
    END IF;
    LOCK TABLE public.days_lock;
    IF to_regclass('public.' || events) IS NULL THEN
        EXECUTE format('CREATE TABLE public.%I (LIKE public.outbox_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)',
            events);
        EXECUTE format('ALTER TABLE public.outbox_events ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
            events, public.uuid7_floor(day::timestamptz), public.uuid7_floor((day + 1)::timestamptz));
        INSERT INTO public.outbox_calendar (day) VALUES (day);
    ELSIF EXISTS (SELECT FROM public.outbox_calendar c WHERE c.day = ensure_outbox_day.day AND c.settled_in IS NOT NULL)
    THEN
        PERFORM public.reopen_outbox_day(day);
    END IF;
END $$;

-- What no month may go for: the purchases of events that are not sent.
CREATE FUNCTION unsent_purchases(OUT purchase_id uuid, OUT status text) RETURNS SETOF record
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS $$
DECLARE
    one date;
    unsent text;
BEGIN
    FOR one IN SELECT c.day FROM public.outbox_calendar c WHERE c.settled_in IS NULL OR c.failed > 0 ORDER BY 1 LOOP
        FOREACH unsent IN ARRAY ARRAY['NEW', 'FAILED'] LOOP -- one by one: each has its partial index
            RETURN QUERY EXECUTE format('SELECT aggregate_id, status FROM public.%I WHERE status = %L',
                'outbox_events_' || to_char(one, 'YYYY_MM_DD'), unsent);
        END LOOP;
    END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION ensure_purchases_month(date), ensure_outbox_day(date), reopen_outbox_day(date),
    unsent_purchases() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION reopen_outbox_day(date) TO purchases_relay;
GRANT EXECUTE ON FUNCTION ensure_purchases_month(date), ensure_outbox_day(date) TO purchases_service;
