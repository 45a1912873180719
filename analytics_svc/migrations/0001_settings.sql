-- Who may come in, and what all processes agree on.
--
-- In all files, functions that run as their owner find every name where it is written: with `public.`, and nothing else
-- than pg_catalog on their path. Otherwise a caller could plant something of its own.

-- Group roles: each process of ours takes on one of them and so has no more rights than its job needs.
DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY ['analytics_consumer', 'analytics_server'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role_name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
                -- Whoever may log in as the owner may become either role: one URL is enough for all processes.
                EXECUTE format('GRANT %I TO CURRENT_USER', role_name);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL; -- roles belong to the whole server: another database's migration was quicker
            END;
        END IF;
        IF NOT pg_has_role(current_user, role_name, 'MEMBER') THEN
            EXECUTE format('GRANT %I TO CURRENT_USER', role_name);
        END IF;
    END LOOP;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE insufficient_privilege USING MESSAGE = format(
        '%1$I may not create or grant roles; an administrator must run once: CREATE ROLE analytics_consumer NOLOGIN;'
        ' CREATE ROLE analytics_server NOLOGIN; GRANT analytics_consumer, analytics_server TO %1$I', current_user);
END
$$;

REVOKE CREATE ON SCHEMA public FROM PUBLIC; -- the default since PostgreSQL 15, but not in a database upgraded to it
GRANT USAGE ON SCHEMA public TO analytics_consumer, analytics_server;
GRANT SELECT ON schema_migrations TO analytics_consumer, analytics_server;

CREATE TABLE analytics_settings (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    time_zone text NOT NULL CHECK (length(time_zone) BETWEEN 1 AND 100),
    page_token_key bytea NOT NULL CHECK (length(page_token_key) = 32)
        DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
);
COMMENT ON TABLE analytics_settings IS 'What all processes of this database must agree on; written once, by the migrate command.';
COMMENT ON COLUMN analytics_settings.time_zone IS 'The zone whose days are business days; every stored day was cut by it.';
COMMENT ON COLUMN analytics_settings.page_token_key IS 'Signs page tokens, so that a page can be continued on any server.';
GRANT SELECT ON analytics_settings TO analytics_consumer, analytics_server;
