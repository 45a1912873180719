-- Who may come in, and what holds for the whole chain.
--
-- In all files, functions that run as their owner find every name where it is written: with `public.`, also those that
-- are computed, and nothing else than pg_catalog on their path. Otherwise a caller could plant something of its own.

-- Roles are groups without login: whoever logs in for a process is a member of its group and acts as it. They belong
-- to the whole server, so another database's migration may have made them, even at this very moment.
DO $$
DECLARE
    missing name;
BEGIN
    FOREACH missing IN ARRAY ARRAY['purchases_service', 'purchases_relay']::name[] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = missing) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', missing);
            EXCEPTION
                WHEN duplicate_object OR unique_violation THEN NULL;
                WHEN insufficient_privilege THEN
                    RAISE EXCEPTION 'role % does not exist and % may not create it', missing, current_user
                        USING HINT = 'An administrator runs: CREATE ROLE purchases_service NOLOGIN; CREATE ROLE '
                            'purchases_relay NOLOGIN; and grants both, with admin option, to the migrating user.';
            END;
        END IF;
        -- With one URL for everything, the migrating user is also the one who runs the processes.
        BEGIN
            EXECUTE format('GRANT %I TO %I', missing, current_user);
        EXCEPTION
            WHEN insufficient_privilege THEN NULL; -- then the processes have logins of their own
        END;
    END LOOP;
END $$;

REVOKE CREATE ON SCHEMA public FROM PUBLIC; -- the default since PostgreSQL 15, but not in a database upgraded to it
GRANT USAGE ON SCHEMA public TO purchases_service, purchases_relay;
GRANT SELECT ON schema_migrations TO purchases_service;

CREATE TABLE chain_settings (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    time_zone text NOT NULL,
    dropped_before date NOT NULL DEFAULT '2000-01-01',
    keep_months int NOT NULL DEFAULT 0 CHECK (keep_months BETWEEN 0 AND 1200),
    keep_outbox_days int NOT NULL DEFAULT 30 CHECK (keep_outbox_days BETWEEN 1 AND 3650),
    page_token_key bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
);
COMMENT ON TABLE chain_settings IS 'One row: what holds for the whole chain. Only the owner changes it.';
COMMENT ON COLUMN chain_settings.time_zone IS 'IANA name of the zone that cuts business days; it never changes.';
COMMENT ON COLUMN chain_settings.dropped_before IS 'Months before this one were dropped, or never were: no sale can come '
    'in there, or one whose key is gone could come in twice.';
COMMENT ON COLUMN chain_settings.keep_months IS
    'Full months of purchases kept besides the current one; older ones may be dropped. 0: everything is kept.';
COMMENT ON COLUMN chain_settings.keep_outbox_days IS
    'Full days of the outbox kept besides today; older ones may be dropped, once all is sent and counted.';
COMMENT ON COLUMN chain_settings.page_token_key IS 'Secret that signs page tokens; all servers share it.';
GRANT SELECT ON chain_settings TO purchases_service;
GRANT SELECT (page_token_key, keep_outbox_days) ON chain_settings TO purchases_relay; -- it serves pages of the outbox
