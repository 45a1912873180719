-- Roll-ups: what questions about many days or branches read, so that their cost grows with neither. All are sums of the
-- tables by day, and grow in the same transactions.
--
-- Every roll-up is paid for with each sale. So there are none that save little: a branch's products over a range of days
-- are summed up from its days, which is a few hundred rows each.

-- Rows of this month and of all time are updated all day long: room on their pages keeps updates off the index.
CREATE TABLE daily_sales_of_chain (
    day date PRIMARY KEY,
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    items_sum bigint NOT NULL CHECK (items_sum >= 0),
    purchases_count bigint NOT NULL CHECK (purchases_count >= 0),
    purchases_with_customer_count bigint NOT NULL
        CHECK (purchases_with_customer_count BETWEEN 0 AND purchases_count)
) WITH (fillfactor = 50);
COMMENT ON TABLE daily_sales_of_chain IS 'daily_sales_by_branch, summed over the branches.';

CREATE TABLE monthly_sales_by_branch (
    branch_id int CHECK (branch_id >= 0),
    month date,
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    items_sum bigint NOT NULL CHECK (items_sum >= 0),
    purchases_count bigint NOT NULL CHECK (purchases_count >= 0),
    purchases_with_customer_count bigint NOT NULL
        CHECK (purchases_with_customer_count BETWEEN 0 AND purchases_count),
    PRIMARY KEY (branch_id, month)
) WITH (fillfactor = 50);
COMMENT ON TABLE monthly_sales_by_branch IS 'daily_sales_by_branch, summed over the days of a month.';
COMMENT ON COLUMN monthly_sales_by_branch.branch_id IS '0 is the whole chain.';
COMMENT ON COLUMN monthly_sales_by_branch.month IS 'Its first day.';

CREATE TABLE product_sales_totals (
    branch_id int CHECK (branch_id > 0),
    product_id bigint CHECK (product_id > 0),
    qty_sum bigint NOT NULL CHECK (qty_sum >= 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    PRIMARY KEY (branch_id, product_id)
) WITH (fillfactor = 50);
CREATE INDEX product_sales_totals_product ON product_sales_totals (product_id); -- the audit goes by products
COMMENT ON TABLE product_sales_totals IS 'product_sales_daily, summed over all days.';

-- What the chain sells of a product: rows that every batch would change, and for which all consumers would wait. So a
-- batch only notes what it has sold, and one process adds up what many have noted (ingest/summing.py). Both at once are
-- the answer, in any snapshot; how far the sums have come changes its cost and nothing else.
CREATE TABLE product_sales_of_chain_sums (
    period text CHECK (period IN ('day', 'month', 'all')),
    first_day date,
    product_id bigint CHECK (product_id > 0),
    qty_sum bigint NOT NULL CHECK (qty_sum >= 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    PRIMARY KEY (period, first_day, product_id),
    CHECK (first_day = CASE period WHEN 'day' THEN first_day WHEN 'month' THEN date_trunc('month', first_day::timestamp)
        ELSE '0001-01-01' END)
) WITH (fillfactor = 50);
CREATE INDEX product_sales_of_chain_sums_product ON product_sales_of_chain_sums (product_id);
COMMENT ON TABLE product_sales_of_chain_sums IS
    'product_sales_daily, summed over the branches, by day, by month and in all; without what is still noted only.';
COMMENT ON COLUMN product_sales_of_chain_sums.first_day IS 'Of the period; 0001-01-01 for all time.';

CREATE TABLE product_sales_of_chain_notes (
    days date[] NOT NULL,
    product_ids bigint[] NOT NULL,
    quantities bigint[] NOT NULL,
    cents bigint[] NOT NULL,
    CHECK (cardinality(days) = ALL (ARRAY [cardinality(product_ids), cardinality(quantities), cardinality(cents)]))
);
-- Read as often as written, and gone within seconds: not worth compressing.
ALTER TABLE product_sales_of_chain_notes ALTER days SET STORAGE EXTERNAL, ALTER product_ids SET STORAGE EXTERNAL,
    ALTER quantities SET STORAGE EXTERNAL, ALTER cents SET STORAGE EXTERNAL;
COMMENT ON TABLE product_sales_of_chain_notes IS
    'What is not in product_sales_of_chain_sums yet: a row for each batch, with the lines of its sales.';

CREATE VIEW product_sales_of_chain AS
    SELECT period, first_day, product_id, qty_sum, revenue_sum FROM product_sales_of_chain_sums
    UNION ALL
    SELECT 'day', day, product_id, quantity, line.cents * 0.01
    FROM product_sales_of_chain_notes, unnest(days, product_ids, quantities, cents)
        AS line (day, product_id, quantity, cents)
    UNION ALL
    SELECT 'month', date(date_trunc('month', day::timestamp)), product_id, quantity, line.cents * 0.01
    FROM product_sales_of_chain_notes, unnest(days, product_ids, quantities, cents)
        AS line (day, product_id, quantity, cents)
    UNION ALL
    SELECT 'all', '0001-01-01', product_id, quantity, line.cents * 0.01
    FROM product_sales_of_chain_notes, unnest(product_ids, quantities, cents) AS line (product_id, quantity, cents);
COMMENT ON VIEW product_sales_of_chain IS
    'product_sales_daily, summed over the branches, by day, by month and in all: several rows of a key are to be added.';

GRANT SELECT, INSERT, UPDATE, DELETE ON daily_sales_of_chain, monthly_sales_by_branch, product_sales_totals,
    product_sales_of_chain_sums TO analytics_consumer;
GRANT SELECT, INSERT, DELETE ON product_sales_of_chain_notes TO analytics_consumer;
GRANT SELECT ON product_sales_of_chain TO analytics_consumer;
GRANT SELECT ON daily_sales_of_chain, monthly_sales_by_branch, product_sales_totals, product_sales_of_chain
    TO analytics_server;
