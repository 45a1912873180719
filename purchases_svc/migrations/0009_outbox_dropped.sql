-- What the outbox no longer has, and what was listed last: a reader that was set back to before what was dropped must
-- be told, and a server that was set back must notice.

ALTER TABLE outbox_listing
    ADD COLUMN given_snapshot pg_snapshot,
    ADD COLUMN dropped_realm text,
    ADD COLUMN dropped_xid xid8;
COMMENT ON COLUMN outbox_listing.realm IS 'In which after_snapshot and given_snapshot have their meaning.';
COMMENT ON COLUMN outbox_listing.given_snapshot IS
    'What the reader was given last. It was committed before the reader got it: a later one is of a future that was lost.';
COMMENT ON COLUMN outbox_listing.dropped_xid IS
    'In dropped_realm: the last transaction of which an event was dropped with its day. Null: none was ever dropped.';
GRANT UPDATE (given_snapshot) ON outbox_listing TO purchases_relay;

-- As before, but only what lies below the reader's snapshot, and so below all that it will ever ask with, is known: one
-- number then tells whether somebody knows all that was dropped.
CREATE OR REPLACE FUNCTION outbox_day_kept_for(day date) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = public, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    partition text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    seen pg_snapshot := (SELECT after_snapshot FROM outbox_listing WHERE realm = transaction_ids_realm());
    unsent text;
    found boolean;
BEGIN
    FOREACH unsent IN ARRAY ARRAY['NEW', 'FAILED'] LOOP -- one by one: each has its partial index
        EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE status = %L)', partition, unsent) INTO found;
        IF found THEN
            RETURN 'some of its events are ' || unsent;
        END IF;
    END LOOP;
    IF seen IS NULL THEN
        RETURN 'nobody has said yet which committed events it knows';
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE created_xid >= pg_snapshot_xmin($1)
        AND created_xid < pg_snapshot_xmax(pg_current_snapshot()))', partition) USING seen INTO found;
    RETURN CASE WHEN found THEN 'the reader of committed events does not know all of it yet' END;
END $$;

-- As before; and remembers up to which transaction events are gone.
CREATE OR REPLACE FUNCTION drop_outbox_day(day date, keep_days int) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    partition text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
    reason text;
    last_xid xid8;
BEGIN
    IF keep_days < 1 OR day >= now()::date - keep_days THEN
        RAISE EXCEPTION 'the day % is kept', day USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_outbox_day')); -- one at a time
    IF to_regclass(partition) IS NULL THEN
        RETURN 'there is no such day';
    END IF;
    reason := outbox_day_kept_for(day);
    IF reason IS NOT NULL THEN
        RETURN reason;
    END IF;
    EXECUTE format('LOCK TABLE ONLY outbox_events, ONLY %I IN ACCESS EXCLUSIVE MODE', partition);
    reason := outbox_day_kept_for(day);
    IF reason IS NOT NULL THEN
        RETURN reason;
    END IF;
    -- Events that arrived with a dump may have numbers that this server has not come to: whoever has a snapshot of this
    -- server knows them, and nobody else; which is what 0 says.
    EXECUTE format('SELECT coalesce((SELECT max(created_xid) FROM %1$I
        WHERE created_xid < pg_snapshot_xmax(pg_current_snapshot())), ''0'') WHERE EXISTS (SELECT FROM %1$I)', partition)
        INTO last_xid;
    UPDATE outbox_listing SET
        dropped_xid = CASE WHEN dropped_realm = transaction_ids_realm() THEN greatest(dropped_xid, last_xid) ELSE last_xid END,
        dropped_realm = transaction_ids_realm()
    WHERE last_xid IS NOT NULL; -- an empty day says nothing
    EXECUTE format('ALTER TABLE outbox_events DETACH PARTITION %I', partition);
    EXECUTE format('DROP TABLE %I', partition);
    RETURN NULL;
END $$;
