-- Roll-ups: what questions about many days read, so that their cost does not grow with the history. All are sums of the
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

CREATE TABLE product_sales_monthly (
    month date,
    product_id bigint CHECK (product_id > 0),
    qty_sum bigint NOT NULL CHECK (qty_sum >= 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    PRIMARY KEY (month, product_id)
) WITH (fillfactor = 50);
CREATE INDEX product_sales_monthly_product ON product_sales_monthly (product_id); -- the audit goes by products
COMMENT ON TABLE product_sales_monthly IS 'product_sales_daily, summed over the branches and the days of a month.';
COMMENT ON COLUMN product_sales_monthly.month IS 'Its first day.';

CREATE TABLE product_sales_totals (
    branch_id int CHECK (branch_id >= 0),
    product_id bigint CHECK (product_id > 0),
    qty_sum bigint NOT NULL CHECK (qty_sum >= 0),
    revenue_sum numeric(30, 2) NOT NULL CHECK (revenue_sum >= 0),
    PRIMARY KEY (branch_id, product_id)
) WITH (fillfactor = 50);
CREATE INDEX product_sales_totals_product ON product_sales_totals (product_id);
COMMENT ON TABLE product_sales_totals IS 'product_sales_daily, summed over all days.';
COMMENT ON COLUMN product_sales_totals.branch_id IS '0 is the whole chain.';

GRANT SELECT, INSERT, UPDATE, DELETE ON daily_sales_of_chain, monthly_sales_by_branch, product_sales_monthly,
    product_sales_totals TO analytics_consumer;
GRANT SELECT ON daily_sales_of_chain, monthly_sales_by_branch, product_sales_monthly, product_sales_totals
    TO analytics_server;
