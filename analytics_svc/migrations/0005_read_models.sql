-- The read models: sums that grow by each event once.
--
-- Money is numeric(30,2): an event's total stays below 10^16 (the contract's limit), so 10^12 of them fit.

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
    product_id bigint CHECK (product_id > 0),
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
    unique_customers_count bigint NOT NULL CHECK (unique_customers_count >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE sales_totals IS 'Sums over all days.';
COMMENT ON COLUMN sales_totals.branch_id IS '0 is the whole chain, whose unique customers are not the sum of the branches''.';

GRANT SELECT, INSERT, UPDATE, DELETE ON daily_sales_by_branch, product_sales_daily, customer_loyalty,
    customer_loyalty_chain, sales_totals TO analytics_consumer; -- a repair takes away rows that should never have been
GRANT SELECT ON daily_sales_by_branch, product_sales_daily, customer_loyalty, customer_loyalty_chain, sales_totals
    TO analytics_server;
