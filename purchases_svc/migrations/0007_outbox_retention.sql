-- Settles a day, so that statements pass it by: nothing in it waits, and nothing can be written to it until it is opened
-- again. Returns why it stays open, or null. Three days are left for clocks that are behind.
--
-- It looks, locks, and looks again: what commits between a look and a lock would wait for ever.
CREATE FUNCTION settle_outbox_day(day date) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    events text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    waits boolean;
    last xid8;
    given_up int;
BEGIN
    IF (day >= '2000-01-01' AND day < now()::date - 2) IS NOT TRUE THEN
        RETURN 'it is not over for long enough';
    END IF;
    PERFORM FROM public.outbox_calendar c
        WHERE c.day = settle_outbox_day.day AND c.settled_in IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'there is no such day, or it is settled';
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM public.%I WHERE status = ''NEW'')', events) INTO waits;
    IF NOT waits THEN
        EXECUTE format('LOCK TABLE public.%I IN ACCESS EXCLUSIVE MODE', events);
        EXECUTE format('SELECT EXISTS (SELECT FROM public.%I WHERE status = ''NEW'')', events) INTO waits;
    END IF;
    IF waits THEN
        RETURN 'some of its events are NEW';
    END IF;
    EXECUTE format('ALTER TABLE public.%I ADD CONSTRAINT settled CHECK (false) NOT VALID', events);
    -- Events that arrived with a dump may have numbers that this server has not come to; no reader's snapshot has those.
    EXECUTE format('SELECT (SELECT max(created_xid) FROM public.%1$I
        WHERE created_xid < pg_snapshot_xmax(pg_current_snapshot())),
        (SELECT count(*) FROM public.%1$I WHERE status = ''FAILED'')', events) INTO last, given_up;
    UPDATE public.outbox_calendar c
        SET settled_in = public.transaction_ids_realm(), last_xid = last, failed = given_up
        WHERE c.day = settle_outbox_day.day;
    RETURN NULL;
END $$;

-- Days of the outbox that may go: wholly sent, and wholly known to the reader of committed events, which tells by the
-- snapshot that it asks with. (Events whose transaction this server has not come to yet arrived with a dump; the reader
-- got them when it asked for everything, as it does after every restore.)

-- Why the day must stay; null when nothing speaks against its going. Only what lies below the reader's snapshot, and so
-- below all that it will ever ask with, is known: one number then tells whether somebody knows all that was dropped.
CREATE FUNCTION outbox_day_kept_for(day date) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    events text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    seen pg_snapshot := (SELECT after_snapshot FROM public.outbox_listing WHERE realm = public.transaction_ids_realm());
    unsent text;
    found boolean;
BEGIN
    FOREACH unsent IN ARRAY ARRAY['NEW', 'FAILED'] LOOP -- one by one: each has its partial index
        EXECUTE format('SELECT EXISTS (SELECT FROM public.%I WHERE status = %L)', events, unsent) INTO found;
        IF found THEN
            RETURN 'some of its events are ' || unsent;
        END IF;
    END LOOP;
    IF seen IS NULL THEN
        RETURN 'nobody has said yet which committed events it knows';
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM public.%I WHERE created_xid >= pg_snapshot_xmin($1)
        AND created_xid < pg_snapshot_xmax(pg_current_snapshot()))', events) USING seen INTO found;
    RETURN CASE WHEN found THEN 'the reader of committed events does not know all of it yet' END;
END $$;

-- The first day that is kept.
CREATE FUNCTION outbox_horizon() RETURNS date
    LANGUAGE sql STABLE SET timezone = 'UTC'
    RETURN (SELECT now()::date - keep_outbox_days FROM public.chain_settings);

-- Drops a day of the outbox, unless something speaks against it; returns that, or null when the day is gone. It notes
-- up to which transaction events are gone.
--
-- It looks, locks, and looks again: what commits between a look and a lock would be lost. The partitioned table is
-- locked first, as everybody does. It waits a second at most, since everybody else would queue up behind it.
CREATE FUNCTION drop_outbox_day(day date) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    events text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    reason text;
    last_xid xid8;
BEGIN
    IF (day >= '2000-01-01' AND day < public.outbox_horizon()) IS NOT TRUE THEN -- years before Christ have names like ours
        RAISE EXCEPTION 'the day % is kept', day USING ERRCODE = 'invalid_parameter_value';
    END IF;
    LOCK TABLE public.days_lock; -- one at a time
    PERFORM FROM public.outbox_calendar c WHERE c.day = drop_outbox_day.day FOR UPDATE;
    IF to_regclass('public.' || events) IS NULL THEN
        RETURN 'there is no such day';
    END IF;
    reason := public.outbox_day_kept_for(day);
    IF reason IS NOT NULL THEN
        RETURN reason;
    END IF;
    EXECUTE format('LOCK TABLE ONLY public.outbox_events, ONLY public.%I IN ACCESS EXCLUSIVE MODE', events);
    reason := public.outbox_day_kept_for(day);
    IF reason IS NOT NULL THEN
        RETURN reason;
    END IF;
    -- Events that arrived with a dump may have numbers that this server has not come to: whoever has a snapshot of this
    -- server knows them, and nobody else; which is what 0 says.
    EXECUTE format('SELECT coalesce((SELECT max(created_xid) FROM public.%1$I
        WHERE created_xid < pg_snapshot_xmax(pg_current_snapshot())), ''0'') WHERE EXISTS (SELECT FROM public.%1$I)',
        events) INTO last_xid;
    UPDATE public.outbox_listing SET
        dropped_xid = CASE WHEN dropped_realm = public.transaction_ids_realm()
            THEN greatest(dropped_xid, last_xid) ELSE last_xid END,
        dropped_realm = public.transaction_ids_realm()
    WHERE last_xid IS NOT NULL; -- an empty day says nothing
    EXECUTE format('ALTER TABLE public.outbox_events DETACH PARTITION public.%I', events);
    EXECUTE format('DROP TABLE public.%I', events);
    DELETE FROM public.outbox_calendar c WHERE c.day = drop_outbox_day.day;
    RETURN NULL;
END $$;

-- What an operator wants to know of each day, oldest first.
CREATE FUNCTION outbox_days(OUT day date, OUT events bigint, OUT bytes bigint)
    RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET timezone = 'UTC'
AS $$
    SELECT to_date(right(c.relname, 10), 'YYYY_MM_DD'), greatest(c.reltuples, 0)::bigint, pg_total_relation_size(c.oid)
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'public.outbox_events'::regclass ORDER BY 1
$$;
COMMENT ON FUNCTION outbox_days IS 'events is the planner''s estimate: counting would read everything.';

REVOKE EXECUTE ON FUNCTION settle_outbox_day(date), outbox_day_kept_for(date), drop_outbox_day(date), outbox_days()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION settle_outbox_day(date), outbox_day_kept_for(date), drop_outbox_day(date), outbox_days()
    TO purchases_relay;
