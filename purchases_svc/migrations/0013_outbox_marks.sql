-- A mark changes the event's row and nothing else: where its page has room, that is a heap-only update. So no index may have
-- a condition on the status. What waits is found by where the relay came to (0010), and the few exceptions by the indexes of
-- those whose next attempt has a time (0011, 0012): of what was given up, that is never.
DROP INDEX outbox_events_created_xid_idx, outbox_events_new, outbox_events_retry, outbox_events_failed;

ALTER TABLE outbox_events ADD CONSTRAINT given_up_has_a_time
    CHECK (status <> 'FAILED' OR next_attempt_at IS NOT NULL) NOT VALID;
COMMENT ON COLUMN outbox_events.next_attempt_at IS
    'Not to be published before; null: at once, as it was never tried. Infinity: given up.';

-- Below this transaction nothing waits, apart from retries. A row and the events it speaks of are of the same moment,
-- whatever a crash, a failover or a restore of files has made of both; only a dump brings ids of another server. So of the
-- realm, the timeline does not matter here.
CREATE OR REPLACE FUNCTION outbox_low_water_xid() RETURNS xid8
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
    RETURN coalesce((SELECT xid FROM public.outbox_low_water
        WHERE split_part(realm, '.', 1) = split_part(public.transaction_ids_realm(), '.', 1)
            AND split_part(realm, '.', 3) = split_part(public.transaction_ids_realm(), '.', 3)), '0');
COMMENT ON TABLE outbox_low_water IS 'Where a relay starts, and counting. Whoever sets it back makes them slower, no more.';

-- As in 0004, with room on each page for the marks of all that is on it.
CREATE OR REPLACE FUNCTION ensure_outbox_day(day date) RETURNS void
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
        EXECUTE format('CREATE TABLE public.%I (LIKE public.outbox_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
            WITH (fillfactor = 50)', events);
        EXECUTE format('ALTER TABLE public.outbox_events ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
            events, public.uuid7_floor(day::timestamptz), public.uuid7_floor((day + 1)::timestamptz));
        INSERT INTO public.outbox_calendar (day) VALUES (day);
    ELSIF EXISTS (SELECT FROM public.outbox_calendar c WHERE c.day = ensure_outbox_day.day AND c.settled_in IS NOT NULL)
    THEN
        PERFORM public.reopen_outbox_day(day);
    END IF;
END $$;

DO $$
DECLARE
    one date;
BEGIN
    FOR one IN SELECT day FROM outbox_calendar WHERE settled_in IS NULL AND day >= now()::date - 1 LOOP
        EXECUTE format('ALTER TABLE %I SET (fillfactor = 50)', 'outbox_events_' || to_char(one, 'YYYY_MM_DD'));
    END LOOP;
END $$;

-- As in 0004: what no month may go for. What waits is found as the relay finds it.
CREATE OR REPLACE FUNCTION unsent_purchases(OUT purchase_id uuid, OUT status text) RETURNS SETOF record
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS $$
DECLARE
    low xid8 := public.outbox_low_water_xid();
    one date;
BEGIN
    FOR one IN SELECT c.day FROM public.outbox_calendar c WHERE c.settled_in IS NULL OR c.failed > 0 ORDER BY 1 LOOP
        RETURN QUERY EXECUTE format('SELECT aggregate_id, status FROM public.%1$I
                WHERE status = ''NEW'' AND created_xid >= $1 AND next_attempt_at IS NULL
            UNION ALL SELECT aggregate_id, status FROM public.%1$I
                WHERE status <> ''SENT'' AND next_attempt_at IS NOT NULL',
            'outbox_events_' || to_char(one, 'YYYY_MM_DD')) USING low;
    END LOOP;
END $$;

-- As in 0006: events that wait to be published, `most` at most.
CREATE OR REPLACE FUNCTION outbox_waiting(most int) RETURNS bigint
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    low xid8 := public.outbox_low_water_xid();
    waiting bigint := 0;
    of_day bigint;
    one date;
BEGIN
    FOR one IN SELECT day FROM public.outbox_calendar WHERE settled_in IS NULL ORDER BY day LOOP
        EXECUTE 'SELECT (SELECT count(*) FROM (SELECT FROM public.outbox_events
                WHERE event_id >= $1 AND event_id < $2 AND status = ''NEW'' AND created_xid >= $3
                    AND next_attempt_at IS NULL LIMIT $4) AS fresh)
            + (SELECT count(*) FROM (SELECT FROM public.outbox_events
                WHERE event_id >= $1 AND event_id < $2 AND status = ''NEW'' AND next_attempt_at IS NOT NULL
                LIMIT $4) AS retries)'
            USING public.uuid7_floor(one::timestamptz), public.uuid7_floor((one + 1)::timestamptz), low, most
            INTO of_day;
        waiting := waiting + of_day;
        EXIT WHEN waiting >= most;
    END LOOP;
    RETURN least(most, waiting);
END $$;

-- As in 0007: settles a day. The look before the lock reads all of the day, and trusts nobody; the one under it looks for
-- what may have come between the two, which was written since, or is an exception.
CREATE OR REPLACE FUNCTION settle_outbox_day(day date) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    events text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    looked pg_snapshot;
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
    EXECUTE format('SELECT pg_current_snapshot(), EXISTS (SELECT FROM public.%I WHERE status = ''NEW'')', events)
        INTO looked, waits;
    IF NOT waits THEN
        EXECUTE format('LOCK TABLE public.%I IN ACCESS EXCLUSIVE MODE', events);
        EXECUTE format('SELECT EXISTS (SELECT FROM public.%1$I WHERE status = ''NEW''
                AND created_xid >= pg_snapshot_xmin($1) AND created_xid < pg_snapshot_xmax(pg_current_snapshot()))
            OR EXISTS (SELECT FROM public.%1$I WHERE status = ''NEW'' AND next_attempt_at IS NOT NULL)', events)
            USING looked INTO waits;
    END IF;
    IF waits THEN
        RETURN 'some of its events are NEW';
    END IF;
    EXECUTE format('ALTER TABLE public.%I ADD CONSTRAINT settled CHECK (false) NOT VALID', events);
    -- Events that arrived with a dump may have numbers that this server has not come to; no reader's snapshot has those.
    EXECUTE format('SELECT (SELECT max(created_xid) FROM public.%1$I
        WHERE created_xid < pg_snapshot_xmax(pg_current_snapshot())),
        (SELECT count(*) FROM public.%1$I WHERE status = ''FAILED'' AND next_attempt_at IS NOT NULL)', events)
        INTO last, given_up;
    UPDATE public.outbox_calendar c
        SET settled_in = public.transaction_ids_realm(), last_xid = last, failed = given_up
        WHERE c.day = settle_outbox_day.day;
    RETURN NULL;
END $$;

-- As in 0007: why the day must stay; null when nothing speaks against its going. In a settled day nothing waits, as
-- nothing was written to it since somebody looked through all of it; one that is open is looked through.
CREATE OR REPLACE FUNCTION outbox_day_kept_for(day date) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET timezone = 'UTC'
AS $$
DECLARE
    events text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    seen pg_snapshot := (SELECT after_snapshot FROM public.outbox_listing WHERE realm = public.transaction_ids_realm());
    settled boolean := (SELECT settled_in IS NOT NULL FROM public.outbox_calendar c
        WHERE c.day = outbox_day_kept_for.day);
    unsent text;
    found boolean;
BEGIN
    EXECUTE format('SELECT status FROM public.%I WHERE status <> ''SENT'' AND ($1 IS NOT TRUE
        OR next_attempt_at IS NOT NULL) ORDER BY status DESC LIMIT 1', events) USING settled INTO unsent;
    IF unsent IS NOT NULL THEN
        RETURN 'some of its events are ' || unsent;
    END IF;
    IF seen IS NULL THEN
        RETURN 'nobody has said yet which committed events it knows';
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM public.%I WHERE created_xid >= pg_snapshot_xmin($1)
        AND created_xid < pg_snapshot_xmax(pg_current_snapshot()))', events) USING seen INTO found;
    RETURN CASE WHEN found THEN 'the reader of committed events does not know all of it yet' END;
END $$;
