-- The read models: sums that grow by each event once, and what is needed to know that it was once.
--
-- Money is numeric(30,2): an event's total stays below 10^16 (the contract's limit), so 10^12 of them fit.

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

CREATE TABLE analytics_settings (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    time_zone text NOT NULL CHECK (length(time_zone) BETWEEN 1 AND 100),
    page_token_key bytea NOT NULL CHECK (length(page_token_key) = 32)
        DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
);
COMMENT ON TABLE analytics_settings IS 'What all processes of this database must agree on; written once, by the migrate command.';
COMMENT ON COLUMN analytics_settings.time_zone IS 'The zone whose days are business days; every stored day was cut by it.';
COMMENT ON COLUMN analytics_settings.page_token_key IS 'Signs page tokens, so that a page can be continued on any server.';

CREATE TABLE analytics_event_log (
    event_id uuid PRIMARY KEY,
    processed_at timestamptz NOT NULL DEFAULT now(),
    event_type text NOT NULL CHECK (length(event_type) <= 100)
);
COMMENT ON TABLE analytics_event_log IS
    'Every event that is counted. Its row commits together with its effect on the sums: the reason why it counts once.';

-- The rows of today are updated all day long: room on their pages lets an update stay there, off the indexes.
CREATE TABLE daily_sales_by_branch (
    day date,
    branch_id int CHECK (branch_id > 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    items_sum bigint NOT NULL CHECK (items_sum >= 0),
    purchases_count bigint NOT NULL CHECK (purchases_count >= 0),
    purchases_with_customer_count bigint NOT NULL
        CHECK (purchases_with_customer_count BETWEEN 0 AND purchases_count),
    PRIMARY KEY (day, branch_id)
) WITH (fillfactor = 50);
COMMENT ON COLUMN daily_sales_by_branch.day IS 'Business day: the day of purchase_time in the chain''s time zone.';
COMMENT ON COLUMN daily_sales_by_branch.revenue_sum IS 'Sum of the purchases'' totals.';
COMMENT ON COLUMN daily_sales_by_branch.items_sum IS 'Sum of the lines'' quantities.';

-- Serves one branch's history. Updates touch no indexed column, so it costs one entry a day.
CREATE INDEX daily_sales_by_branch_branch ON daily_sales_by_branch (branch_id, day);

CREATE TABLE product_sales_daily (
    day date,
    branch_id int CHECK (branch_id > 0),
    product_id int CHECK (product_id > 0),
    qty_sum bigint NOT NULL CHECK (qty_sum >= 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    PRIMARY KEY (day, branch_id, product_id)
) WITH (fillfactor = 80);
COMMENT ON COLUMN product_sales_daily.day IS 'Business day: the day of purchase_time in the chain''s time zone.';
COMMENT ON COLUMN product_sales_daily.revenue_sum IS 'Sum of quantity times unit price.';
-- Serves one product's history, which is thinly spread over the primary key.
CREATE INDEX product_sales_daily_product ON product_sales_daily (product_id, day, branch_id);

CREATE TABLE customer_loyalty (
    customer_id uuid,
    branch_id int CHECK (branch_id > 0),
    purchases_count bigint NOT NULL CHECK (purchases_count > 0),
    last_purchase_at timestamptz NOT NULL,
    PRIMARY KEY (customer_id, branch_id)
);
COMMENT ON TABLE customer_loyalty IS
    'Purchases of a customer in one branch. Loyal is who buys often in the whole chain: see customer_loyalty_chain.';
-- The negative count makes "most first, equal ones by id" one ascending order, which a page can continue in by index.
CREATE INDEX customer_loyalty_most_first ON customer_loyalty (branch_id, (-purchases_count), customer_id);

CREATE TABLE customer_loyalty_chain (
    customer_id uuid PRIMARY KEY,
    purchases_count bigint NOT NULL CHECK (purchases_count > 0),
    last_purchase_at timestamptz NOT NULL
);
COMMENT ON TABLE customer_loyalty_chain IS 'Purchases of a customer over all branches.';
CREATE INDEX customer_loyalty_chain_most_first ON customer_loyalty_chain ((-purchases_count), customer_id);

CREATE TABLE sales_totals (
    branch_id int PRIMARY KEY CHECK (branch_id >= 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    items_sum bigint NOT NULL CHECK (items_sum >= 0),
    purchases_count bigint NOT NULL CHECK (purchases_count >= 0),
    purchases_with_customer_count bigint NOT NULL
        CHECK (purchases_with_customer_count BETWEEN 0 AND purchases_count),
    unique_customers_count bigint NOT NULL
        CHECK (unique_customers_count BETWEEN 0 AND purchases_with_customer_count)
) WITH (fillfactor = 50);
COMMENT ON TABLE sales_totals IS 'Sums over all days.';
COMMENT ON COLUMN sales_totals.branch_id IS '0 is the whole chain, whose unique customers are not the sum of the branches''.';

CREATE TABLE freshness (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    applied_at timestamptz,
    quarantined_count bigint NOT NULL DEFAULT 0 CHECK (quarantined_count >= 0),
    complete_through_at timestamptz,
    after_snapshot text
) WITH (fillfactor = 50);
COMMENT ON TABLE freshness IS 'How far the read models have come; read together with every answer.';
COMMENT ON COLUMN freshness.applied_at IS 'When the newest batch of events was counted; NULL before the first.';
COMMENT ON COLUMN freshness.quarantined_count IS 'Rows of quarantined_events, kept by its trigger.';
COMMENT ON COLUMN freshness.complete_through_at IS
    'Every purchase committed before it is counted or quarantined; NULL until that is known.';
COMMENT ON COLUMN freshness.after_snapshot IS 'The snapshot of the purchases database that complete_through_at stands for.';
INSERT INTO freshness DEFAULT VALUES;

CREATE TABLE quarantined_events (
    quarantine_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    event_id uuid,
    reason text NOT NULL CHECK (reason ~ '^[A-Z][A-Z_]{0,62}$'),
    detail text NOT NULL CHECK (length(detail) <= 1000),
    body bytea NOT NULL,
    properties jsonb NOT NULL,
    quarantined_at timestamptz NOT NULL DEFAULT now(),
    body_sha256 bytea NOT NULL GENERATED ALWAYS AS (sha256(body)) STORED,
    -- Delivered again, the same poison finds its row.
    UNIQUE NULLS NOT DISTINCT (body_sha256, reason, event_id)
);
COMMENT ON TABLE quarantined_events IS 'Events that could not be counted: nothing that arrives is dropped.';
COMMENT ON COLUMN quarantined_events.event_id IS 'From the body, else from the message; NULL when neither has one.';
COMMENT ON COLUMN quarantined_events.body IS 'As it arrived, byte for byte.';
COMMENT ON COLUMN quarantined_events.properties IS 'The message''s AMQP properties, headers included.';
CREATE INDEX quarantined_events_event_id ON quarantined_events (event_id);

-- Every answer carries the number of quarantined events. Counting them each time would make all queries slow on the
-- very day that a producer floods the quarantine.
CREATE FUNCTION count_quarantined_events() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE freshness SET quarantined_count = quarantined_count + (SELECT count(*) FROM changed);
    ELSIF TG_OP = 'DELETE' THEN
        UPDATE freshness SET quarantined_count = quarantined_count - (SELECT count(*) FROM changed);
    ELSE
        UPDATE freshness SET quarantined_count = 0;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER inserted AFTER INSERT ON quarantined_events REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantined_events();
CREATE TRIGGER deleted AFTER DELETE ON quarantined_events REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantined_events();
CREATE TRIGGER truncated AFTER TRUNCATE ON quarantined_events
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantined_events();

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC;
REVOKE ALL ON FUNCTION count_quarantined_events() FROM PUBLIC;

GRANT SELECT ON schema_migrations TO analytics_consumer, analytics_server;
GRANT SELECT ON analytics_settings TO analytics_server;
GRANT SELECT (only_row, time_zone) ON analytics_settings TO analytics_consumer; -- it has no use for the key

GRANT SELECT, INSERT ON analytics_event_log, quarantined_events TO analytics_consumer;
GRANT SELECT, INSERT, UPDATE ON daily_sales_by_branch, product_sales_daily, customer_loyalty, customer_loyalty_chain,
    sales_totals TO analytics_consumer;
GRANT SELECT, UPDATE ON freshness TO analytics_consumer;

GRANT SELECT ON daily_sales_by_branch, product_sales_daily, customer_loyalty, customer_loyalty_chain, sales_totals,
    freshness TO analytics_server;
