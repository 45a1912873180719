-- What was sold, written once, never changed.

CREATE TABLE customers (
    customer_id uuid PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT, INSERT ON customers TO purchases_service;

-- Which customers' rows are locked, so that a sale to them would have to wait: they are skipped where others are read.
CREATE FUNCTION held_customers(ids uuid[]) RETURNS SETOF uuid
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH free AS MATERIALIZED (
        SELECT customer_id FROM public.customers WHERE customer_id = ANY (ids) FOR KEY SHARE SKIP LOCKED
    )
    SELECT customer_id FROM public.customers WHERE customer_id = ANY (ids)
    EXCEPT
    SELECT customer_id FROM free
$$;
REVOKE ALL ON FUNCTION held_customers(uuid[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION held_customers(uuid[]) TO purchases_service;

-- Purchases and items are cut into months of purchase_time, in UTC, so that indexes stay small and whole months can
-- go. A unique constraint on a partitioned table must contain the partition key, hence the keys on two columns.
-- purchase_id is a UUIDv7 made of purchase_time, so that an id alone tells its partition.
CREATE TABLE purchases (
    purchase_id uuid NOT NULL,
    receipt_id text NOT NULL CHECK (length(receipt_id) BETWEEN 1 AND 64),
    idempotency_key uuid NOT NULL,
    branch_id int NOT NULL CHECK (branch_id > 0),
    cashier_id int NOT NULL CHECK (cashier_id > 0),
    pos_id text NOT NULL CHECK (pos_id ~ '^[A-Za-z0-9._-]{1,32}$'),
    customer_id uuid REFERENCES customers,
    purchase_time timestamptz NOT NULL,
    -- At most a day from UTC's, so a day's purchases are found in a range of times that is a day wider at either end.
    business_day date NOT NULL CHECK (business_day - (purchase_time AT TIME ZONE 'UTC')::date BETWEEN -1 AND 1),
    total_amount numeric(18, 2) NOT NULL CHECK (total_amount >= 0),
    item_count int NOT NULL CHECK (item_count BETWEEN 1 AND 2000),
    event_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    created_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (purchase_id, purchase_time)
) PARTITION BY RANGE (purchase_time);
COMMENT ON COLUMN purchases.business_day IS 'Day of purchase_time in the chain''s time zone, as it was decided when the '
    'sale was recorded. Whoever asks for a day asks for this one: no range of times is a day everywhere.';
COMMENT ON COLUMN purchases.item_count IS 'Number of items, so that control totals need no join: 18 times cheaper.';
COMMENT ON COLUMN purchases.event_id IS 'The event that announces this purchase.';
COMMENT ON COLUMN purchases.created_xid IS
    'The transaction that recorded it: tells on which days something was recorded since an audit looked last.';
CREATE INDEX ON purchases (branch_id, purchase_time);
CREATE INDEX ON purchases (purchase_time);
CREATE INDEX ON purchases (business_day, created_xid);
CREATE INDEX ON purchases (customer_id, purchase_time) WHERE customer_id IS NOT NULL;
GRANT SELECT, INSERT ON purchases TO purchases_service;

CREATE TABLE purchase_items (
    purchase_item_id bigint GENERATED ALWAYS AS IDENTITY (CACHE 100),
    purchase_id uuid NOT NULL,
    purchase_time timestamptz NOT NULL,
    product_id bigint NOT NULL CHECK (product_id > 0), -- a GTIN has up to 14 digits
    qty int NOT NULL CHECK (qty = 1),
    unit_price numeric(14, 2) NOT NULL CHECK (unit_price >= 0),
    line_total numeric(14, 2) NOT NULL CHECK (line_total = unit_price * qty),
    PRIMARY KEY (purchase_item_id, purchase_time)
) PARTITION BY RANGE (purchase_time);
COMMENT ON TABLE purchase_items IS 'Lines of purchases. Each month has UNIQUE (purchase_id, product_id), which is all that '
    'is wanted, as a purchase lies in one month; and its foreign key to the same month of purchases.';
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
COMMENT ON COLUMN receipts.business_day IS 'The purchase''s.';
GRANT SELECT, INSERT ON receipts TO purchases_service;
