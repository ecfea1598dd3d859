-- Keys: streams. Arguments: time to live, most events, most bytes, how long a claim is known, the locks, most bytes of
-- all streams; for each stream the thread and its lock as it was taken, or nothing, the key of the run's claim, or
-- nothing, and its number, how many events, and they. Gives where each ends, "" for one that is refused, and nil for one
-- that takes no more, or whose lock was lost: who reads has what was stored by then.
local ttl, most, next, found = ARGV[1], tonumber(ARGV[3]), 7, {}
-- By how many bytes the sum of all is to grow yet, and whether it grew.
local grown, has_grown = 0, false
local sizes = accounts(ARGV[5])
local function lost(thread, mine)
    return mine ~= '' and tonumber(redis.call('ZSCORE', ARGV[5], thread) or '0') ~= tonumber(mine)
end
local function refused(key, number)
    if key == '' then return false end
    local known = tonumber(redis.call('GET', key) or '0')
    -- After all was lost, who has the run makes it known again.
    if known < number then redis.call('SET', key, number, 'PX', ARGV[4]) end
    return known > number
end
-- An entry may take a quarter more than was counted, MAXLEN takes what nobody counts, and what an older release appended
-- is in no account, nor does it say 'n'.
local function count_in(key, bytes, is_unsure)
    grown, has_grown = grown + bytes, true
    local size = redis.call('HINCRBY', sizes, key, bytes)
    if not (is_unsure or size == bytes or size > most) then return end
    size = measure(key)
    while size > most and redis.call('XLEN', key) > 1 do
        redis.call('XTRIM', key, 'MAXLEN', '=', math.floor(redis.call('XLEN', key) / 2))
        size = measure(key)
    end
end
-- The last entry of each append says how many bytes came since the accounts were told: they are each 4 KiB.
local function append(key, next, count)
    local epoch, offset, gone, uncounted = last(key)
    if gone then return false end
    if not epoch then
        epoch, offset, uncounted = restart(key, ttl), 0, 0
        has_grown = true
    end
    offset = tonumber(offset)
    local prefix = epoch .. '-'
    -- And what each takes beside its body, about.
    local bytes = 36 * count
    for n = 1, count do bytes = bytes + #ARGV[next + n] end
    local many = bytes > 8192 or offset % 256 + count >= 256
    local rest = (uncounted or 0) + bytes
    local is_due = many or not uncounted or rest > 4096
    for n = 1, count do
        local place, body = prefix .. string.format('%.0f', offset + n), ARGV[next + n]
        if n < count then
            redis.call('XADD', key, 'MAXLEN', '=', ARGV[2], place, 'e', body)
        else
            redis.call('XADD', key, 'MAXLEN', '=', ARGV[2], place, 'e', body, 'n', is_due and 0 or rest)
        end
    end
    if is_due then count_in(key, rest, many or not uncounted) end
    redis.call('PEXPIRE', key, ttl)
    redis.call('PUBLISH', key,
        prefix .. string.format('%.0f\n', offset + 1) .. table.concat(ARGV, '\0', next + 1, next + count))
    return prefix .. string.format('%.0f', offset + count)
end
for i, key in ipairs(KEYS) do
    local count = tonumber(ARGV[next + 4])
    if lost(ARGV[next], ARGV[next + 1]) then
        found[i] = false
    elseif refused(ARGV[next + 2], tonumber(ARGV[next + 3])) then
        found[i] = ''
    else
        found[i] = append(key, next + 4, count)
    end
    next = next + count + 5
end
-- Each look gives 4 KiB or more where a stream goes, so these outrun what was appended.
if has_grown and redis.call('HINCRBY', sizes, '', grown) > tonumber(ARGV[6]) then
    shed(ARGV[5], tonumber(ARGV[6]), ttl, 32 + grown / 2048)
end
return found
