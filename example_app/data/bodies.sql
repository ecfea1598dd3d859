-- What the astronomer looks up. Days are Earth's.
CREATE TABLE bodies (
    name TEXT PRIMARY KEY COLLATE NOCASE, kind TEXT NOT NULL, circles TEXT NOT NULL,
    diameter_km INTEGER NOT NULL, orbit_days REAL NOT NULL, moons INTEGER NOT NULL
);
INSERT INTO bodies VALUES
    ('Mercury', 'planet', 'Sun', 4879, 87.97, 0),
    ('Venus', 'planet', 'Sun', 12104, 224.7, 0),
    ('Earth', 'planet', 'Sun', 12742, 365.26, 1),
    ('Mars', 'planet', 'Sun', 6779, 686.98, 2),
    ('Jupiter', 'planet', 'Sun', 139820, 4332.59, 95),
    ('Saturn', 'planet', 'Sun', 116460, 10759.22, 146),
    ('Uranus', 'planet', 'Sun', 50724, 30688.5, 28),
    ('Neptune', 'planet', 'Sun', 49244, 60182, 16),
    ('Pluto', 'dwarf planet', 'Sun', 2377, 90560, 5),
    ('Moon', 'moon', 'Earth', 3475, 27.32, 0),
    ('Io', 'moon', 'Jupiter', 3643, 1.77, 0),
    ('Europa', 'moon', 'Jupiter', 3122, 3.55, 0),
    ('Ganymede', 'moon', 'Jupiter', 5268, 7.15, 0),
    ('Callisto', 'moon', 'Jupiter', 4821, 16.69, 0),
    ('Titan', 'moon', 'Saturn', 5150, 15.95, 0),
    ('Enceladus', 'moon', 'Saturn', 504, 1.37, 0),
    ('Triton', 'moon', 'Neptune', 2707, 5.88, 0);
