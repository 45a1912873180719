-- The purchases database: what was sold, written once, never changed.

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

REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO purchases_service, purchases_relay;
GRANT SELECT ON schema_migrations TO purchases_service;

CREATE TABLE chain_settings (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    time_zone text NOT NULL,
    dropped_before date NOT NULL DEFAULT '2000-01-01',
    page_token_key bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
);
COMMENT ON TABLE chain_settings IS 'One row: what must never change once purchases are stored.';
COMMENT ON COLUMN chain_settings.time_zone IS 'IANA name of the zone that cuts business days.';
COMMENT ON COLUMN chain_settings.dropped_before IS 'Months before this one were dropped, or never were: no sale can come '
    'in there, or one whose key is gone could come in twice.';
COMMENT ON COLUMN chain_settings.page_token_key IS 'Secret that signs page tokens; all servers share it.';
GRANT SELECT ON chain_settings TO purchases_service;

CREATE TABLE customers (
    customer_id uuid PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT, INSERT ON customers TO purchases_service;

-- Purchases and items are cut into months of purchase_time, in UTC, so that indexes stay small and whole months can
-- go. A unique constraint on a partitioned table must contain the partition key, hence the keys on two columns.
-- purchase_id is a UUIDv7 made of purchase_time, so that an id alone tells its partition.
CREATE TABLE purchases (
    purchase_id uuid NOT NULL,
    receipt_id text NOT NULL CHECK (length(receipt_id) BETWEEN 1 AND 64),
    idempotency_key uuid NOT NULL,
    branch_id int NOT NULL CHECK (branch_id > 0),
    cashier_id int NOT NULL CHECK (cashier_id > 0),
    pos_id text NOT NULL CHECK (length(pos_id) BETWEEN 1 AND 32),
    customer_id uuid REFERENCES customers,
    purchase_time timestamptz NOT NULL,
    total_amount numeric(18, 2) NOT NULL CHECK (total_amount >= 0),
    item_count int NOT NULL CHECK (item_count BETWEEN 1 AND 2000),
    event_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (purchase_id, purchase_time)
) PARTITION BY RANGE (purchase_time);
COMMENT ON COLUMN purchases.item_count IS 'Number of items, so that control totals need no join: 18 times cheaper.';
COMMENT ON COLUMN purchases.event_id IS 'The event that announces this purchase.';
CREATE INDEX ON purchases (branch_id, purchase_time);
CREATE INDEX ON purchases (purchase_time);
CREATE INDEX ON purchases (customer_id, purchase_time) WHERE customer_id IS NOT NULL;
GRANT SELECT, INSERT ON purchases TO purchases_service;

CREATE TABLE purchase_items (
    purchase_item_id bigint GENERATED ALWAYS AS IDENTITY (CACHE 100),
    purchase_id uuid NOT NULL,
    purchase_time timestamptz NOT NULL,
    product_id int NOT NULL CHECK (product_id > 0),
    qty int NOT NULL CHECK (qty = 1),
    unit_price numeric(14, 2) NOT NULL CHECK (unit_price >= 0),
    line_total numeric(14, 2) NOT NULL CHECK (line_total = unit_price * qty),
    PRIMARY KEY (purchase_item_id, purchase_time),
    UNIQUE (purchase_id, product_id, purchase_time)
) PARTITION BY RANGE (purchase_time);
COMMENT ON TABLE purchase_items IS 'Lines of purchases. Each month has UNIQUE (purchase_id, product_id), and its foreign '
    'key to the same month of purchases.';
COMMENT ON COLUMN purchase_items.qty IS 'The chain sells one unit of a product per purchase.';
CREATE INDEX ON purchase_items (purchase_id);
CREATE INDEX ON purchase_items (product_id, purchase_id);
GRANT SELECT, INSERT ON purchase_items TO purchases_service;

-- Uniqueness over all months needs tables of their own, written in the same transaction as the purchase.
CREATE TABLE idempotency_keys (
    idempotency_key uuid PRIMARY KEY,
    purchase_id uuid NOT NULL,
    purchase_time timestamptz NOT NULL,
    event_id uuid NOT NULL
);
COMMENT ON TABLE idempotency_keys IS 'Every key ever used, as long as its purchase is kept.';
COMMENT ON COLUMN idempotency_keys.event_id IS 'The consistency token, so that a replay returns it, too.';
GRANT SELECT, INSERT ON idempotency_keys TO purchases_service;

CREATE TABLE receipts (
    branch_id int NOT NULL,
    pos_id text NOT NULL,
    business_day date NOT NULL,
    receipt_id text NOT NULL,
    purchase_id uuid NOT NULL,
    purchase_time timestamptz NOT NULL,
    PRIMARY KEY (branch_id, pos_id, business_day, receipt_id)
) PARTITION BY RANGE (business_day);
COMMENT ON COLUMN receipts.business_day IS 'Day of purchase_time in the chain''s time zone.';
GRANT SELECT, INSERT ON receipts TO purchases_service;

-- Makes sure that purchases of one month (UTC) can be stored. Services may not run DDL, so it runs as its owner: with
-- a fixed search_path, and only for months in which a purchase may lie. To be called in a transaction of its own,
-- before the insert: in the inserting statement it is too late. Safe to call from several places at once. It waits a
-- second at most for locks, because everybody else would queue up behind it; then it fails and is called again.
CREATE FUNCTION ensure_purchases_month(month date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    suffix text := to_char(month, 'YYYY_MM');
    receipts_month date;
BEGIN
    IF month <> date_trunc('month', month) OR month > now() + interval '1 year'
        OR month < (SELECT coalesce(max(dropped_before), '2000-01-01') FROM chain_settings)
    THEN
        RAISE EXCEPTION 'no purchase can lie in the month %', month USING ERRCODE = 'datetime_field_overflow';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_purchases_month'));
    IF to_regclass('purchases_' || suffix) IS NULL THEN
        EXECUTE format('CREATE TABLE %I PARTITION OF purchases FOR VALUES FROM (%L) TO (%L)',
            'purchases_' || suffix, month::timestamptz, (month + interval '1 month')::timestamptz);
    END IF;
    IF to_regclass('purchase_items_' || suffix) IS NULL THEN
        -- The foreign key runs from month to month: both have the same bounds, so it says the same as one between the
        -- partitioned tables. That one looks through all months for each item: 67 us at 24 months instead of 3.
        EXECUTE format('CREATE TABLE %I PARTITION OF purchase_items (UNIQUE (purchase_id, product_id),
            FOREIGN KEY (purchase_id, purchase_time) REFERENCES %I (purchase_id, purchase_time))
            FOR VALUES FROM (%L) TO (%L)', 'purchase_items_' || suffix, 'purchases_' || suffix,
            month::timestamptz, (month + interval '1 month')::timestamptz);
    END IF;
    -- At its edges, a month in UTC has business days of the month before or after.
    FOREACH receipts_month IN ARRAY ARRAY[month - interval '1 month', month, month + interval '1 month']::date[] LOOP
        IF to_regclass('receipts_' || to_char(receipts_month, 'YYYY_MM')) IS NULL THEN
            EXECUTE format('CREATE TABLE %I PARTITION OF receipts FOR VALUES FROM (%L) TO (%L)',
                'receipts_' || to_char(receipts_month, 'YYYY_MM'), receipts_month,
                (receipts_month + interval '1 month')::date);
        END IF;
    END LOOP;
END $$;
REVOKE EXECUTE ON FUNCTION ensure_purchases_month(date) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ensure_purchases_month(date) TO purchases_service;
