-- What the relay's OutboxService reads and remembers.

GRANT SELECT (page_token_key) ON chain_settings TO purchases_relay;

-- Where snapshots and transaction ids have a meaning. After a restore or a failover, ids are handed out a second time.
CREATE FUNCTION transaction_ids_realm() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    RETURN (SELECT system_identifier FROM pg_control_system())
        || '.' || left(pg_walfile_name(pg_current_wal_lsn()), 8) -- the timeline, which a promotion changes
        || '.' || (SELECT oid FROM pg_database WHERE datname = current_database());

-- The snapshot that the reader of committed events was sure of last: its name for all that it has. Of the outbox,
-- nothing may go that lies outside of it.
CREATE TABLE outbox_listing (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    realm text,
    after_snapshot pg_snapshot,
    received_at timestamptz
);
COMMENT ON COLUMN outbox_listing.after_snapshot IS 'Null: nobody has asked yet, or somebody asked for everything.';
INSERT INTO outbox_listing DEFAULT VALUES;
GRANT SELECT, UPDATE (realm, after_snapshot, received_at) ON outbox_listing TO purchases_relay;

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
