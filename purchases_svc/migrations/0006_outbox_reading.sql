-- What the readers of the outbox remember: the relay, which publishes it, and whoever follows what was committed.

-- Where snapshots and transaction ids have a meaning. After a restore or a failover, ids are handed out a second time.
CREATE FUNCTION transaction_ids_realm() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    RETURN (SELECT system_identifier FROM pg_control_system())
        || '.' || left(pg_walfile_name(pg_current_wal_lsn()), 8) -- the timeline, which a promotion changes
        || '.' || (SELECT oid FROM pg_database WHERE datname = current_database());

-- The reader of committed events names what it has by a snapshot. A reader that was set back to before what was dropped
-- must be told, and a server that was set back must notice.
CREATE TABLE outbox_listing (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    realm text,
    after_snapshot pg_snapshot,
    received_at timestamptz,
    given_snapshot pg_snapshot,
    dropped_realm text,
    dropped_xid xid8
);
COMMENT ON COLUMN outbox_listing.realm IS 'In which after_snapshot and given_snapshot have their meaning.';
COMMENT ON COLUMN outbox_listing.after_snapshot IS 'What the reader was sure of last: of the outbox, nothing may go that '
    'lies outside of it. Null: nobody has asked yet, or somebody asked for everything.';
COMMENT ON COLUMN outbox_listing.given_snapshot IS
    'What the reader was given last. It was committed before the reader got it: a later one is of a future that was lost.';
COMMENT ON COLUMN outbox_listing.dropped_xid IS
    'In dropped_realm: the last transaction of which an event was dropped with its day. Null: none was ever dropped.';
INSERT INTO outbox_listing DEFAULT VALUES;
GRANT SELECT, UPDATE (realm, after_snapshot, received_at, given_snapshot) ON outbox_listing TO purchases_relay;

-- Nobody is sure of what was not given to a reader before, and nothing is given that has not happened. (To go back is
-- allowed: a reader that was set back must; more is kept for it then.)
CREATE FUNCTION refuse_what_was_not_given() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.after_snapshot IS NOT NULL AND (NEW.realm = OLD.realm
        AND pg_snapshot_xmax(NEW.after_snapshot) <= pg_snapshot_xmax(OLD.given_snapshot)) IS NOT TRUE
        OR pg_snapshot_xmax(NEW.given_snapshot) > pg_snapshot_xmax(pg_current_snapshot())
    THEN
        RAISE EXCEPTION 'no reader was given this snapshot' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER given BEFORE UPDATE ON outbox_listing FOR EACH ROW
    WHEN (NEW.after_snapshot::text IS DISTINCT FROM OLD.after_snapshot::text
        OR NEW.given_snapshot::text IS DISTINCT FROM OLD.given_snapshot::text)
    EXECUTE FUNCTION refuse_what_was_not_given();
REVOKE ALL ON FUNCTION refuse_what_was_not_given() FROM PUBLIC;

-- Below this transaction id nothing waits, apart from retries. Counting from there costs what the backlog is worth, and
-- not what was sent since the last vacuum: with an old snapshot open that is millions of index entries.
CREATE TABLE outbox_low_water (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    realm text NOT NULL DEFAULT '',
    xid xid8 NOT NULL DEFAULT '0'
);
COMMENT ON TABLE outbox_low_water IS 'A help for counting only; the relay does not depend on it.';
INSERT INTO outbox_low_water DEFAULT VALUES;
GRANT SELECT ON outbox_low_water TO purchases_service, purchases_relay;
GRANT UPDATE (realm, xid) ON outbox_low_water TO purchases_relay;

CREATE FUNCTION outbox_low_water_xid() RETURNS xid8
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
    RETURN coalesce((SELECT xid FROM public.outbox_low_water WHERE realm = public.transaction_ids_realm()), '0');

-- Events that wait to be published, `most` at most.
CREATE FUNCTION outbox_waiting(most int) RETURNS bigint
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
                WHERE event_id >= $1 AND event_id < $2 AND status = ''NEW'' AND created_xid >= $3 LIMIT $4) AS fresh)
            + (SELECT count(*) FROM (SELECT FROM public.outbox_events
                WHERE event_id >= $1 AND event_id < $2 AND status = ''NEW'' AND next_attempt_at IS NOT NULL
                    AND created_xid < $3 LIMIT $4) AS retries)'
            USING public.uuid7_floor(one::timestamptz), public.uuid7_floor((one + 1)::timestamptz), low, most
            INTO of_day;
        waiting := waiting + of_day;
        EXIT WHEN waiting >= most;
    END LOOP;
    RETURN least(most, waiting);
END $$;

-- How many there were when somebody counted them last. Who finds that old locks the row, counts, and stores it; the others
-- read it here.
CREATE TABLE outbox_backlog (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    waiting bigint NOT NULL DEFAULT 0,
    counted_up_to bigint NOT NULL DEFAULT 0,
    counted_at timestamptz NOT NULL DEFAULT '-infinity',
    took interval NOT NULL DEFAULT '0'
) WITH (fillfactor = 10);
COMMENT ON COLUMN outbox_backlog.counted_up_to IS 'Where counting stops.';
INSERT INTO outbox_backlog DEFAULT VALUES;
GRANT SELECT, UPDATE (waiting, counted_up_to, counted_at, took) ON outbox_backlog TO purchases_service;

-- Relays that have nothing to do. Whoever writes an event while one waits tells it so, after the commit.
CREATE UNLOGGED TABLE relay_waiting (
    pid int PRIMARY KEY,
    until timestamptz NOT NULL
);
COMMENT ON COLUMN relay_waiting.until IS 'A relay that is gone says no more: its row counts for nothing after that.';
GRANT SELECT ON relay_waiting TO purchases_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON relay_waiting TO purchases_relay;

-- What holds back vacuum in this database the most: the horizon that the oldest snapshot sets. Runs as its owner: with
-- the rights of pg_monitor it sees everybody's sessions, without them only those of roles that it is a member of.
CREATE FUNCTION cleanup_blocker(
    least_age interval, OUT kind text, OUT pid int, OUT name text, OUT transaction_age interval, OUT transactions bigint
)
    RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT kind, pid, name, age, transactions
    FROM (
        SELECT 'SESSION', a.pid, a.application_name, clock_timestamp() - a.xact_start,
               greatest(age(a.backend_xmin), age(a.backend_xid))::bigint
        FROM pg_stat_activity a
        -- A standby's feedback counts wherever it is connected to; a vacuum holds back nothing.
        WHERE (a.datname = current_database() AND a.backend_type = 'client backend' OR a.backend_type = 'walsender')
            AND a.pid <> pg_backend_pid() AND a.query NOT ILIKE 'vacuum%'
        UNION ALL
        SELECT 'PREPARED_TRANSACTION', 0, p.gid, clock_timestamp() - p.prepared, age(p.transaction)
        FROM pg_prepared_xacts p WHERE p.database = current_database()
        UNION ALL
        SELECT 'REPLICATION_SLOT', coalesce(s.active_pid, 0), s.slot_name::text, NULL, age(s.xmin)
        FROM pg_replication_slots s
    ) AS holder(kind, pid, name, age, transactions)
    WHERE transactions IS NOT NULL AND (age >= least_age OR age IS NULL)
    ORDER BY transactions DESC, age DESC NULLS LAST LIMIT 1
$$;
REVOKE EXECUTE ON FUNCTION cleanup_blocker(interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cleanup_blocker(interval) TO purchases_relay;
