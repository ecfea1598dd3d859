-- Keys: streams. Arguments: time to live, most events, most bytes, how long a claim is known, the locks; for each
-- stream the thread and its lock as it was taken, or nothing, the key of the run's claim, or nothing, and its number,
-- how many events, and they. Gives where each ends, "" for one that is refused, and nil for one that takes no more, or
-- whose lock was lost: who reads has what was stored by then.
local ttl, most, next, found = ARGV[1], tonumber(ARGV[3]), 6, {}
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
local function append(key, next, count)
    local bytes = 0
    local epoch, offset, gone = last(key)
    if gone then return false end
    if not epoch then epoch, offset = restart(key, ttl), 0 end
    offset = tonumber(offset)
    local prefix = epoch .. '-'
    for n = 1, count do
        local body = ARGV[next + n]
        bytes = bytes + #body
        redis.call('XADD', key, 'MAXLEN', '=', ARGV[2], prefix .. string.format('%.0f', offset + n), 'e', body)
    end
    if bytes > 8192 or offset % 256 + count >= 256 then
        while redis.call('MEMORY', 'USAGE', key) > most and redis.call('XLEN', key) > 1 do
            redis.call('XTRIM', key, 'MAXLEN', '=', math.floor(redis.call('XLEN', key) / 2))
        end
    end
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
return found
